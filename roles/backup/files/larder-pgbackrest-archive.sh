#!/bin/sh
# PostgreSQL's archive_command (pgBackRest refuses one without its name): larder-pgbackrest-archive PATH
#
# After a failover a server may hold the last segment of a former timeline in which it received less, or more, than what the repository
# has. Nobody needs it: the present timeline begins with a segment of its own that repeats what is common. But PostgreSQL would try it for
# ever, and archive nothing after it.
set -eu
ended=0
/usr/bin/pgbackrest --stanza=larder archive-push "$1" || ended=$?
# The repository has a file of this name with other bytes.
[ "$ended" -eq 45 ] || exit "$ended"
name=${1##*/}
present=$(find "${1%/*}" -maxdepth 1 -name '????????.history' | sort | tail -n 1)
present=${present##*/}
case $name in
  *.history | *.backup) exit "$ended" ;;
esac
# Eight hexadecimal digits each.
[ "$((0x${name%"${name#????????}"}))" -lt "$((0x0${present%.history}))" ] || exit "$ended"
echo "larder-pgbackrest-archive: $name is of a former timeline, and the repository has another server's end of it: passed over" >&2
