#!/bin/sh
# Build the image of the container hosts: build_image.sh IMAGE RECIPE RELEASE USER ARCHIVES PACKAGE...
# ARCHIVES, names with blanks between them, are packages that a host finds downloaded and not installed.
# From Docker's Debian image where a registry answers, else by mmdebstrap from Debian's archive; both give the same packages.
set -eu
image=$1 recipe=$2 release=$3 user=$4 archives=$5
shift 5

# Scenarios that start side by side want the same image: the first one builds it, and the others wait here and find it.
# The lock is on this script, which every user may read.
exec 9< "$0"
flock 9

# Another checkout, or another scenario, may have built the same recipe already.
existing=$(docker images --quiet --filter "label=larder.recipe=$recipe" | head -n 1)
if [ -n "$existing" ]; then
  docker tag "$existing" "$image"
  exit 0
fi

# Nobody types passwords on a container's console, and watching for it takes two of the machine's few inotify instances per host.
# No container host outlives a crash of its machine, so dpkg does not wait for the disk after each file.
setup="useradd --create-home --shell /bin/bash $user
echo '$user ALL=(ALL:ALL) NOPASSWD: ALL' > /etc/sudoers.d/$user
chmod 0440 /etc/sudoers.d/$user
rm -f /etc/ssh/ssh_host_*
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/container
ln -s /dev/null /etc/systemd/system/systemd-ask-password-console.path
ln -s /dev/null /etc/systemd/system/systemd-ask-password-wall.path"

if timeout 20 docker pull --quiet "debian:$release" > /dev/null 2>&1; then
  docker build --quiet --label "larder.recipe=$recipe" --tag "$image" - << EOF
FROM debian:$release
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $*
RUN $(printf '%s' "$setup" | sed 's/$/ \&\& \\/' | sed '$ s/ && \\$//')
EOF
else
  # Whoever installs something else just now is waited for.
  command -v mmdebstrap > /dev/null || apt-get install -y -o DPkg::Lock::Timeout=300 --no-install-recommends mmdebstrap > /dev/null
  archive=$(mktemp -d)
  trap 'rm -rf "$archive"' EXIT
  printf '%s\n' "$setup" > "$archive/setup.sh"
  # The package lists stay: a freshly installed host has them, and check mode needs them.
  mmdebstrap --quiet --variant=minbase --include="$(echo "$*" | tr ' ' ',')" --skip=cleanup/apt/lists \
    --customize-hook="chroot \"\$1\" sh -eu < $archive/setup.sh" "$release" "$archive/root.tar"
  docker import --change "LABEL larder.recipe=$recipe" "$archive/root.tar" "$image" > /dev/null
fi

# As bare as before, but every host of every scenario downloads them no more. Without this layer the image is good too: where Debian's
# archive answers by the inventory's base_apt_sources alone, the hosts download for themselves.
docker build --quiet --tag "$image" - << EOF || echo "The image has no packages downloaded: the hosts download them." >&2
FROM $image
RUN rm -f /etc/apt/apt.conf.d/docker-clean && apt-get update -qq \
  && apt-get install -y -qq --download-only --no-install-recommends $archives
EOF
