"""What the gateway promises to its clients, and what it refuses to everybody else."""

import http.client
import json
import re
import select
import socket
import ssl
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

testinfra_hosts = ["ansible://gateway1"]

DEFAULTS = yaml.safe_load((Path(__file__).parents[3] / "roles/gateway/defaults/main.yml").read_text())
# Seconds for which a request may hang, and one for a busy machine.
HANGS = 2 + 1
READABLE = select.POLLIN | select.POLLHUP
PATHS = [
    ("POST", "/get-online-features"),
    ("GET", "/features/A?features=market_features:close"),
    ("POST", "/push"),
    ("POST", "/write-to-online-store"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/docs"),
    ("GET", "/"),
]
FOR_NOBODY = [
    ("POST", "/materialize"),
    ("POST", "/materialize-incremental"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/chat"),
    ("POST", "/chat"),
    ("GET", "/static/chat/index.html"),
    ("POST", "/search"),
    ("GET", "/v1/vector_stores"),
    ("GET", "/push"),
    ("POST", "/features/A"),
    ("GET", "/features"),
    ("GET", "/featuresA"),
    ("GET", "/x/../features/A"),
    ("PUT", "/get-online-features"),
    ("POST", "/push/"),
    ("POST", "//push"),
    ("POST", "/x/../push"),
    ("POST", "/%70ush"),
    ("GET", "/stats"),
    ("GET", "/haproxy?stats"),
]


def wait_until_up(stats):
    """Wait until the gateway uses every instance: one that took no connection for some seconds is down for two more."""
    end = time.monotonic() + 60
    while set(stats("status", "check_status").values()) != {("UP", "L7OK")}:
        assert time.monotonic() < end
        time.sleep(1)


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("token", [None, "", "wrong", "reader", "writer"])
def test_nothing_is_answered_without_a_valid_token(gateway, method, path, token):
    answer = gateway.ask(method, path, token)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert set(answer.json) == {"detail"}


def test_a_token_counts_only_as_a_bearer_token(gateway):
    for headers in ({"Authorization": f"Basic {gateway.writer}"}, {"X-Authorization": f"Bearer {gateway.writer}"}):
        assert gateway.ask("GET", "/ready", headers=headers).status == 401
    assert gateway.ask("GET", f"/ready?token={gateway.writer}").status == 401


@pytest.mark.parametrize("path", ["/push", "/write-to-online-store"])
def test_a_reader_may_not_push(gateway, path):
    answer = gateway.ask("POST", path, gateway.reader, {})
    assert (answer.status, set(answer.json)) == (403, {"detail"})
    assert gateway.push("REFUSED", 1.0, gateway.reader).status == 403
    assert gateway.read("REFUSED", gateway.reader).json["results"][1]["values"] == [None]


@pytest.mark.parametrize("value", [12.5, -0.25])
def test_the_reader_reads_the_quote_that_the_writer_pushed(gateway, value):
    symbol = f"PUSHED{value}"
    assert gateway.push(symbol, value, gateway.writer).status == 200
    for token in (gateway.reader, gateway.writer):
        assert gateway.read(symbol, token).json["results"][1]["values"] == [value]


@pytest.mark.parametrize("symbol", ["TYPED", "TYPED/USD", "TYPED%20USD"])
def test_one_symbol_can_be_read_by_its_address(gateway, symbol):
    assert gateway.push(symbol.replace("%20", " "), 7.5, gateway.writer).status == 200
    for token in (gateway.reader, gateway.writer):
        answer = gateway.ask("GET", f"/features/{symbol}?features=market_features:close&max_age_s=3600", token)
        assert (answer.status, answer.json["results"][1]["values"]) == (200, [7.5])


@pytest.mark.parametrize(("method", "path"), FOR_NOBODY)
def test_other_paths_and_methods_are_not_found(gateway, method, path):
    for token in (gateway.reader, gateway.writer):
        answer = gateway.ask(method, path, token, "{}" if method != "GET" else None)
        assert (answer.status, answer.json) == (404, {"detail": "not found"})


def test_health_and_readiness_are_for_every_client(gateway):
    assert gateway.ask("GET", "/health", gateway.reader).status == 200
    assert gateway.ask("GET", "/ready", gateway.reader).json["status"] == "ready"


def test_a_large_body_is_refused(gateway):
    for path, token, size in (
        ("/get-online-features", gateway.reader, 262_144),
        ("/push", gateway.writer, 1_048_576),
    ):
        assert gateway.ask("POST", path, token, "x" * size).status in (400, 422)
        refused = gateway.ask("POST", path, token, "x" * (size + 1))
        assert refused.status == 413
        assert str(size) in refused.json["detail"]
    assert gateway.ask("POST", "/get-online-features", gateway.reader, iter([b"x"])).status == 411


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        {"entities": {"symbol": ["A"]}, "features": ["missing:close"]},
        {"entities": {"symbol": ["A"]}, "features": ["market_features:missing"]},
        {"entities": {"symbol": ["A"]}, "features": ["nonsense"]},
        {"entities": {"symbol": ["A"]}, "features": []},
        {"entities": {"symbol": [{"a": 1}]}, "features": ["market_features:close"]},
        {"entities": {"other": ["A"]}, "features": ["market_features:close"]},
        {"entities": {}, "features": ["market_features:close"]},
        {"entities": {"symbol": ["A"]}, "feature_service": "missing"},
    ],
)
def test_a_bad_request_is_a_client_error_without_internals(gateway, body):
    answer = gateway.ask("POST", "/get-online-features", gateway.reader, body)
    assert answer.status in (400, 404, 422)
    assert "Traceback" not in answer.text
    assert "server" not in answer.headers


def test_a_read_of_too_many_values_is_refused(gateway):
    body = {"entities": {"symbol": ["A"] * 40_000}, "feature_service": "trading_signals"}
    answer = gateway.ask("POST", "/get-online-features", gateway.reader, body)
    assert answer.status == 413
    assert "40000 rows x 3 features" in answer.json["detail"]
    assert "may ask for 100000" in answer.json["detail"]


@pytest.mark.parametrize("port", [6566, 6567, 6576, 6577, 6586, 6587, 6596, 6597])
def test_clients_cannot_reach_the_instances_directly(hosts, port):
    """The firewall of the base role opens the instances' ports to the gateways only."""
    server = hosts["server1"].ansible.get_variables()["ansible_host"]
    script = f"import socket; socket.create_connection(('{server}', {port}), timeout=3)"
    assert hosts["client1"].run(f'python3 -c "{script}"').failed
    assert hosts["gateway1"].run(f'python3 -c "{script}"').succeeded


def test_no_host_stores_a_token(hosts, gateway):
    gateway.ask("GET", f"/ready?token={gateway.writer}", gateway.writer)
    gateway.ask("GET", "/docs", gateway.writer)
    for token in (gateway.reader, gateway.writer):
        for place in ("grep -r . /etc/haproxy /run/haproxy", "journalctl --no-pager", "ps auxeww"):
            assert token not in hosts["gateway1"].run(place).stdout
        assert (
            token not in hosts["server1"].run("journalctl --no-pager -u 'feature-server@*' -u 'push-server@*'").stdout
        )


def test_only_the_gateways_port_listens(hosts):
    listeners = hosts["gateway1"].run("ss -Hlntp").stdout.splitlines()
    assert [line.split()[3] for line in listeners if "haproxy" in line] == ["0.0.0.0:8443"]


def test_http_is_refused(gateway):
    plain = http.client.HTTPConnection(gateway.address, 8443, timeout=10)
    plain.request("GET", "/ready", headers={"Authorization": f"Bearer {gateway.reader}"})
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        plain.getresponse()
    for port in (80, 8080):
        with pytest.raises(OSError, match=r"refused|timed out"):
            socket.create_connection((gateway.address, port), timeout=2)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
def test_old_tls_is_refused_by_the_gateway(gateway, version):
    old = ssl.create_default_context(cadata=gateway.authority)
    old.set_ciphers("ALL:@SECLEVEL=0")  # the client itself would refuse TLS 1.1 before it asks
    old.minimum_version = old.maximum_version = version
    with pytest.raises(ssl.SSLError, match="alert protocol version"):
        gateway.connect(old).connect()


def test_connections_of_a_client_address_are_limited(gateway):
    most, more = DEFAULTS["gateway_client_connections"], 20
    with ExitStack() as stack:
        poll = select.poll()
        for _ in range(most + more):
            poll.register(stack.enter_context(socket.create_connection((gateway.address, 8443), timeout=10)), READABLE)
        end = time.monotonic() + 5  # after ten seconds without a handshake the gateway ends the others, too
        while len(ended := poll.poll(1000)) < more:
            assert time.monotonic() < end
        assert len(ended) == more
    assert gateway.ask_until(lambda answer: answer.status == 200, 30).json["status"] == "ready"


def test_a_client_that_asks_too_often_gets_429_and_recovers(gateway):
    most = DEFAULTS["gateway_client_requests_per_second"]
    answers = gateway.flood(b"GET /ready HTTP/1.1\r\nHost: gateway\r\n\r\n", 10 * most)
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", answers)
    assert statuses.count(b"401") > most / 2, "it is not refused before"
    assert set(statuses) == {b"401", b"429"}
    assert b'{"detail":"too many requests"}' in answers
    assert gateway.ask_until(lambda answer: answer.status != 429, 30).json["status"] == "ready"


def test_a_token_that_asks_too_often_gets_429_and_others_are_served(gateway):
    most = DEFAULTS["gateway_token_requests_per_second"]
    head = f"POST /get-online-features HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {gateway.reader}\r\n\r\n"
    answers = gateway.flood(head.encode(), 10 * most)
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", answers)
    assert statuses.count(b"411") > most / 2, "it is not refused before"
    assert set(statuses) == {b"411", b"429"}
    refusal = answers[answers.rindex(b"HTTP/1.1 429") :]
    assert b"retry-after: 1\r\n" in refusal.lower()
    assert b'{"detail":"too many requests"}' in refusal
    assert gateway.read("ANY", gateway.writer).status == 200
    assert gateway.ask_until(lambda answer: answer.status != 429, 30).status == 200


def test_simultaneous_requests_of_a_token_are_limited(gateway, hosts, stats):
    most, more = DEFAULTS["gateway_token_requests"], 12
    server, units = hosts["server1"], "feature-server@1 feature-server@2"
    answers = []
    with ThreadPoolExecutor(most + more) as clients:
        server.check_output(f"systemctl kill --signal=STOP {units}")
        try:
            asked = [clients.submit(gateway.read, "ANY", gateway.reader) for _ in range(most + more)]
            for answered in as_completed(asked, timeout=10):
                answers.append(answered.result())
                if len(answers) == more:
                    break
            time.sleep(0.5)
            assert sum(future.done() for future in asked) == more
            assert gateway.push("ANOTHER", 1.0, gateway.writer).status == 200, "another token's are not counted"
        finally:
            server.check_output(f"systemctl kill --signal=CONT {units}")
    assert {(answer.status, answer.headers.get("retry-after")) for answer in answers} == {(429, "1")}
    # The others wait for an instance, on a busy machine for longer than they may: that is a 503.
    statuses = Counter(future.result().status for future in asked)
    assert statuses[429] == more
    assert statuses[200] > 0
    wait_until_up(stats)


def test_reads_of_new_connections_share_the_connections_to_the_instances(gateway, stats):
    reads = 40

    def made() -> int:
        return sum(int(count) for (count,) in stats("connect").values())

    before = made()
    for _ in range(reads):
        assert gateway.read("ANY", gateway.reader).status == 200
    # HAProxy closes a connection that was not needed for some seconds, and a thread of it may have none yet.
    assert made() - before <= reads / 2


def test_what_is_no_http_is_a_client_error(gateway):
    connection = gateway.connect()
    connection.connect()
    connection.sock.sendall(b"NO HTTP\r\n\r\n")
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    assert answer.status == 400
    connection.close()


def test_a_request_without_its_body_reaches_no_instance_and_gets_408(gateway, stats):
    connection = gateway.connect()
    connection.putrequest("POST", "/get-online-features")
    connection.putheader("Authorization", f"Bearer {gateway.reader}")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    time.sleep(1)
    assert set(stats("scur").values()) == {("0",)}
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)) == (408, {"detail": "the request took too long"})
    connection.close()


def test_the_journal_has_refused_requests_and_not_every_read(gateway, hosts):
    body = {"entities": {"symbol": ["ANY"]}, "features": ["market_features:close"]}
    journal = "journalctl --no-pager --unit=haproxy --since=-1min"
    for path, status in (("/get-online-features?answered", 200), ("/no-such-path?refused", 404)):
        assert gateway.ask("POST", path, gateway.reader, body).status == status
    logged = hosts["gateway1"].check_output(journal)
    assert "/no-such-path 404" in logged
    reads = [line for line in logged.splitlines() if "/get-online-features 200" in line]
    assert reads == []


def test_a_client_checks_the_gateways_certificate(gateway):
    connection = gateway.connect()
    connection.connect()
    assert connection.sock.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|local issuer"):
        gateway.connect(ssl.create_default_context()).connect()
    with (
        pytest.raises(ssl.SSLCertVerificationError, match="not valid for"),
        socket.create_connection((gateway.address, 8443), timeout=10) as stream,
    ):
        gateway.trusting.wrap_socket(stream, server_hostname="gateway2")


def test_http_2_is_spoken(gateway):
    both = ssl.create_default_context(cadata=gateway.authority)
    both.set_alpn_protocols(["h2", "http/1.1"])
    connection = gateway.connect(both)
    connection.connect()
    assert connection.sock.selected_alpn_protocol() == "h2"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_probe_has_no_body(gateway, chunked):
    answer = gateway.ask("GET", "/ready", gateway.reader, iter([b"12345"]) if chunked else "12345")
    assert (answer.status, answer.json) == (400, {"detail": "bad request"})


def test_haproxy_is_sandboxed(hosts):
    host = hosts["gateway1"]
    assert host.run("systemd-analyze security --threshold=15 haproxy.service").rc == 0
    pids = host.run("cat /sys/fs/cgroup/system.slice/haproxy.service/cgroup.procs").stdout.split()
    assert len(pids) == 2
    for pid in pids:
        status = dict(line.split(":\t", 1) for line in host.file(f"/proc/{pid}/status").content_string.splitlines())
        assert status["CapEff"] == status["CapBnd"] == "0000000000000000"
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert set(status["Uid"].split()) != {"0"}
        assert host.run(f"nsenter --target {pid} --mount ls -A /home /root").stdout.split() == ["/home:", "/root:"]


def test_a_dead_instance_fails_no_read_while_the_other_one_is_full(hosts, gateway, stats):
    """HAProxy sends requests to a dead instance until it knows.

    The other one is full because it stands still, for less than the second after which a connection has failed.
    """
    most = DEFAULTS["gateway_server_small_reads"]
    server, script = hosts["server1"], "systemctl kill --signal={} feature-server@{}"
    steps = [script.format("STOP", 1), "sleep 0.2", script.format("KILL", 2), "sleep 0.5", script.format("CONT", 1)]
    statuses = Counter()

    def reads(until):
        while not until.done():
            statuses[gateway.read("ANY", gateway.reader).status] += 1

    with ThreadPoolExecutor(2 * most + 1) as clients:
        killed = clients.submit(server.check_output, "; ".join(steps))
        for _ in range(2 * most):
            clients.submit(reads, killed)
        killed.result()
    wait_until_up(stats)
    assert statuses[200] > 2 * most
    assert set(statuses) == {200}


def test_an_instance_that_is_out_of_reach_makes_no_read_fail_or_hang(hosts, gateway, stats):
    """Nobody says that it is gone: packets of kept connections and of new ones are lost, and its check port answers."""
    server = hosts["server1"]
    rules = "; ".join(
        f"add chain inet cut_off {chain} {{ type filter hook {chain} priority -10; }};"
        f" add rule inet cut_off {chain} tcp {port} 6567 drop"
        for chain, port in (("input", "dport"), ("output", "sport"))
    )
    for _ in range(20):
        assert gateway.read("ANY", gateway.reader).status == 200
    before = sum(int(count) for (count,) in stats("wretr").values())
    server.check_output(f"nft 'add table inet cut_off; {rules}'")
    taken = []
    try:
        for _ in range(8):
            started = time.monotonic()
            assert gateway.read("ANY", gateway.reader).status == 200
            taken.append(time.monotonic() - started)
    finally:
        server.check_output("nft delete table inet cut_off")
    assert sum(int(count) for (count,) in stats("wretr").values()) > before, "no read met the instance"
    assert max(taken) <= HANGS


def test_redis_that_hangs_is_a_504_and_no_other_instance_is_waited_for(hosts, gateway):
    server = hosts["server1"]
    server.check_output("systemctl kill --signal=STOP redis-server")
    try:
        started = time.monotonic()
        answer = gateway.read("ANY", gateway.reader)
        assert (answer.status, answer.json) == (504, {"detail": "a store did not answer in time"})
        assert time.monotonic() - started <= HANGS
    finally:
        server.check_output("systemctl kill --signal=CONT redis-server")
    assert gateway.read_until(None, 30).status == 200


def test_without_redis_the_answer_is_a_quick_503_until_redis_is_back(hosts, gateway):
    redis = hosts["server1"]
    redis.check_output("systemctl stop redis-server")
    try:
        started = time.monotonic()
        answer = gateway.read("ANY", gateway.reader)
        assert time.monotonic() - started < 10
        assert (answer.status, answer.json) == (503, {"detail": "a store is not available"})
        # After this answer the health checks have noticed.
        assert gateway.read_until("no feature server is available", 30).status == 503
    finally:
        redis.check_output("systemctl start redis-server")
    assert gateway.read_until(None, 30).status == 200


@pytest.mark.parametrize("kind", ["read", "push"])
def test_a_request_is_answered_while_the_last_instances_go_away(hosts, gateway, stats, kind):
    """It is on its way from instance to instance when none is left: HAProxy itself would close a read's connection."""
    answers, redis = Counter(), hosts["server1"]

    def ask():
        read = kind == "read"
        return gateway.read("ANY", gateway.reader) if read else gateway.push("GOES-AWAY", 1.5, gateway.writer)

    def asks():
        while answers["no feature server is available"] < 20:
            answer = ask()
            answers[answer.json["detail"] if answer.status != 200 else None] += 1

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(asks) for _ in range(8)]
        redis.check_output("systemctl stop redis-server")
        try:
            for each in running:
                each.result(60)
        finally:
            answers["no feature server is available"] += 20
            redis.check_output("systemctl start redis-server")
    wait_until_up(stats)
    assert set(answers) == {None, "a store is not available", "no feature server is available"}


def test_the_former_haproxy_configuration_is_kept(on):
    kept = on("gateway1").file("/etc/haproxy/haproxy.cfg.before-larder")
    assert "frontend shop" in kept.content_string
