# Give the virtual address $1 to another gateway, without breaking a connection to port $2.
set -eu

# wait_while SECONDS COMMAND...: until the command finds nothing.
wait_while() {
  end=$(($(date +%s) + $1))
  shift
  while [ -n "$("$@")" ] && [ "$(date +%s)" -lt "$end" ]; do sleep 0.1; done
}
# HAProxy is a master and a worker; a third process is the worker from before the reload.
former_processes() { sed 1,2d "/sys/fs/cgroup$(systemctl show --property=ControlGroup --value haproxy.service)/cgroup.procs"; }
connections() {
  ss -Hnt state established state syn-recv state close-wait state fin-wait-1 state closing state last-ack \
    "( src $1 and sport = :$2 )"
}
address() { ip -brief address show to "$1"; }

if [ -z "$(address "$1")" ]; then exit 0; fi
# A connection cannot move to another host: let each end with the answer to its next request. The role writes the file anew.
sed -i 's| alpn h2,http/1.1 | alpn http/1.1 |; s|^    option idle-close-on-response$|&\n    option httpclose|' /etc/haproxy/haproxy.cfg
systemctl reload haproxy.service
# The process from before the reload ends when each of its connections has been answered once more, or was not used for 30 s.
wait_while 65 former_processes
# A client that connects now is not refused: its kernel tries again after a second, and finds the other gateway.
trap 'nft delete table inet larder_hand_over' EXIT
nft -f - <<END
table inet larder_hand_over {
  chain input {
    type filter hook input priority -10;
    ip daddr $1 tcp dport $2 tcp flags & (syn | ack) == syn drop
  }
}
END
wait_while 20 connections "$1" "$2"
systemctl stop keepalived.service
wait_while 5 address "$1"
echo moved
