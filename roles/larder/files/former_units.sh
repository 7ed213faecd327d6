# List the units of which a process runs code that is no longer on the disk, because its package was upgraded. The kernel names some
# deleted programs of other mount namespaces "/ (deleted)".
for process in /proc/[0-9]*; do
  if grep -q ' r-xp .* /\(\(usr\|opt\)/.*\)\{0,1\} (deleted)$' "$process/maps" 2> /dev/null; then
    sed -n 's|.*/\([^/]*\.service\).*|\1|p' "$process/cgroup" 2> /dev/null
  fi
done | sort -u
