"""What an instance promises: to its clients, to systemd, and when a store is away."""

import time

import pytest

testinfra_hosts = ["ansible://server1"]

UNITS = {"feature-server@1": 6566, "feature-server@2": 6567, "push-server@1": 6576, "push-server@2": 6577}


@pytest.fixture(params=UNITS)
def unit(request):
    return request.param


def pids(server, unit):
    processes = server.host.check_output(
        "cat /sys/fs/cgroup/system.slice/system-%s.slice/%s.service/cgroup.procs",
        unit.split("@")[0].replace("-", "\\x2d"),
        unit,
    ).split()
    assert len(processes) == 2, "gunicorn and one worker"
    return processes


def test_every_instance_reads_features_and_starts_at_boot(server, unit):
    assert server.ask(UNITS[unit], "/ready").json["status"] == "ready"
    assert server.host.service(unit).is_enabled


OWN = "-CAfile {own}/ca.crt -cert {own}/tls.crt -key {own}/tls.key"


@pytest.mark.parametrize(
    ("options", "answers"),
    [
        (OWN, True),
        ("-CAfile {own}/ca.crt", False),
        ("-CAfile {own}/ca.crt -cert /root/foreign.crt -key /root/foreign.key", False),
        (f"{OWN} -tls1_2", False),
    ],
    ids=["own certificate", "no certificate", "certificate of a foreign CA", "TLS 1.2"],
)
def test_only_a_client_that_the_stack_knows_is_answered(server, unit, options, answers):
    server.host.check_output(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=server1"
        " -keyout /root/foreign.key -out /root/foreign.crt 2>&1"
    )
    request = "printf 'GET /health HTTP/1.1\\r\\nHost: server1\\r\\n\\r\\n'; sleep 2"
    command = f"({request}) | openssl s_client -connect {server.address}:{UNITS[unit]} {options} 2>&1"
    answer = server.host.run(command.format(own=server.certificate)).stdout
    assert ("HTTP/1.1 200" in answer) is answers


def test_a_request_without_tls_is_not_answered(server, unit):
    url = f"http://{server.address}:{UNITS[unit]}/ready"
    script = f"import urllib.request; urllib.request.urlopen('{url}', timeout=5)"
    result = server.host.run(f'python3 -c "{script}"')
    assert result.failed
    assert "RemoteDisconnected" in result.stderr or "ConnectionResetError" in result.stderr


def test_an_instance_shows_its_own_name_and_no_other(server, unit):
    own = server.certificate
    known = f"-CAfile {own}/ca.crt -cert {own}/tls.crt -key {own}/tls.key -verify_return_error"
    for name, accepted in (("server1", True), ("server2", False)):
        result = server.host.run(
            f"openssl s_client -connect {server.address}:{UNITS[unit]} {known} -verify_hostname {name} < /dev/null"
        )
        assert (result.rc == 0) is accepted
    assert "hostname mismatch" in (result.stdout + result.stderr).lower()


def test_the_instances_are_closed_to_strangers(server, stranger, unit):
    script = f"import socket; socket.create_connection(('{server.address}', {UNITS[unit]}), timeout=3)"
    assert stranger.run(f'python3 -c "{script}"').failed


@pytest.mark.parametrize("port", [6576, 6577])
def test_a_pushed_quote_is_read(server, port):
    assert server.push(port, f"PUSHED{port}", 12.5).status == 200
    for reader in (6566, 6567):
        assert server.read(reader, f"PUSHED{port}").json["results"][1]["values"] == [12.5]


@pytest.mark.parametrize("port", [6566, 6567])
def test_a_read_server_has_no_right_to_write(server, port):
    answer = server.push(port, "REFUSED", 1.0)
    assert (answer.status, answer.json) == (500, {"detail": "internal error"})
    assert server.read(6566, "REFUSED").json["results"][1]["values"] == [None]


def test_a_quote_with_an_epoch_time_is_at_that_instant_in_both_stores(server):
    answer = server.push(6576, "EPOCH", 1.5, "online_and_offline", event_timestamp=1764111157, created=1764111157000)
    assert answer.status == 200, answer
    quote = server.read(6566, "EPOCH").json["results"][1]
    assert (quote["values"], quote["event_timestamps"]) == ([1.5], ["2025-11-25T22:52:37Z"])
    assert server.quotes("EPOCH") == "1764111157.000000"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"event_timestamp": "2199-01-01T00:00:00Z"}, "at most 60 s ahead of the server's clock"),
        ({"event_timestamp": 20261125}, "event_timestamp of row 1 is 20261125: it takes ISO 8601, or epoch"),
        ({"volume": "many"}, 'volume of row 1 is "many": it takes'),
        ({"noise": 1.0}, "noise is no column of"),
    ],
    ids=["from the future", "a date as a number", "a word", "an unknown column"],
)
def test_a_refused_push_is_in_neither_store(server, columns, expected):
    answer = server.push(6576, "NEITHER", 1.0, "online_and_offline", **columns)
    assert answer.status == 422
    assert expected in answer.json["detail"]
    assert server.read(6566, "NEITHER").json["results"][1]["values"] == [None]
    assert server.quotes("NEITHER") == ""


def test_invalid_http_gets_an_error_like_every_other(server):
    options = OWN.format(own=server.certificate)
    request = r"(printf 'no HTTP\r\n\r\n'; sleep 2)"
    answer = server.host.run(
        f"{request} | openssl s_client -quiet -connect {server.address}:6566 {options} 2>/dev/null"
    )
    assert answer.stdout.startswith("HTTP/1.1 400 Bad Request")
    assert answer.stdout.endswith('{"detail": "Invalid HTTP request received."}')


def test_an_instance_is_sandboxed(server, unit):
    assert server.host.run(f"systemd-analyze security --threshold=15 {unit}.service").rc == 0
    for pid in pids(server, unit):
        status = dict(
            line.split(":\t", 1) for line in server.host.file(f"/proc/{pid}/status").content_string.splitlines()
        )
        assert status["CapEff"] == status["CapBnd"] == "0000000000000000"
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert server.host.check_output(f"ps -o user= -p {pid}") == "feast"
        inside = f"nsenter --target {pid} --mount --"
        assert server.host.check_output(f"{inside} ls -A /home /root").split() == ["/home:", "/root:"]
        assert server.host.run(f"{inside} touch /opt/feast/x").failed


def test_no_secret_is_in_the_environment_or_the_command(server, unit):
    secrets = [*server.variables["timescaledb_passwords"].values(), *server.variables["redis_passwords"].values()]
    for pid in pids(server, unit):
        seen = server.host.check_output(f"cat /proc/{pid}/environ /proc/{pid}/cmdline | tr '\\0' '\\n'")
        assert "LARDER_REVISION=" in seen
        assert not [secret for secret in secrets if secret in seen]
    journal = server.host.check_output(f"journalctl --no-pager --unit={unit}")
    assert not [secret for secret in secrets if secret in journal]


def test_a_restart_returns_when_the_instance_serves(server):
    server.host.check_output("systemctl restart feature-server@1")
    assert server.ask(6566, "/ready").status == 200


def test_an_instance_that_stops_serves_until_the_gateway_knows(server):
    """This host is the inventory's gateway, so its requests count as the gateway's."""
    server.host.check_output("systemctl --no-block restart feature-server@2")
    time.sleep(1)
    assert server.read(6567, "ANY").status == 200, "it serves while it drains"
    answer = server.ask(6567, "/ready")
    assert (answer.status, answer.json["status"], answer.json["unaware"]) == (404, "draining", [])
    server.host.check_output("systemctl start feature-server@2")
    assert server.ask(6567, "/ready").status == 200


def test_an_instance_that_the_gateway_does_not_ask_stops_at_the_deadline(server):
    main = "systemctl show --value --property=MainPID push-server@2"
    before = server.host.check_output(main)
    server.host.check_output("systemctl --no-block restart push-server@2")
    time.sleep(4)
    assert server.host.check_output(main) == before
    deadline = time.monotonic() + 60
    while server.host.check_output(main) == before:
        assert time.monotonic() < deadline
        time.sleep(1)
    server.host.check_output("systemctl start push-server@2")


def test_a_killed_instance_comes_back(server):
    server.host.check_output("systemctl kill --signal=KILL feature-server@1")
    deadline = time.monotonic() + 180
    while server.host.run("systemctl is-active --quiet feature-server@1").failed and time.monotonic() < deadline:
        time.sleep(1)
    assert server.ask(6566, "/ready").status == 200


@pytest.mark.parametrize(
    ("signal", "status", "detail"),
    [("STOP", 504, "a store did not answer in time"), ("KILL", 503, "a store is not available")],
)
def test_without_redis_the_answer_is_a_quick_error(server, signal, status, detail):
    """Redis hangs (STOP), or is gone (KILL, and not back for some seconds)."""
    redis = server.host
    if signal == "STOP":
        redis.check_output("systemctl kill --signal=STOP redis-server")
    else:
        redis.check_output("systemctl stop redis-server")
    try:
        answer = server.read(6566, "ANY")
        assert (answer.status, answer.json) == (status, {"detail": detail})
        assert answer.seconds < 5
        ready = server.ask(6566, "/ready")
        assert (ready.status, ready.json["status"]) == (503, "no online store")
        assert ready.seconds < 5
    finally:
        redis.check_output("systemctl kill --signal=CONT redis-server; systemctl start redis-server")
    assert server.read(6566, "ANY").status == 200
    assert server.ask(6566, "/ready").status == 200


def test_without_postgresql_reads_go_on_and_then_new_views_are_seen(server):
    postgresql = server.host
    postgresql.check_output("systemctl stop postgresql@17-main")
    try:
        # Longer than an instance trusts its copy of the registry.
        time.sleep(12)
        assert server.read(6566, "ANY").status == 200
        assert server.ask(6566, "/ready").status == 200
    finally:
        postgresql.check_output("systemctl start postgresql@17-main")


def test_an_applied_view_is_served_without_a_restart(server):
    views = "/opt/feast/feature_repo/later_view.py"
    before = pids(server, "feature-server@1")
    assert server.read(6566, "ANY", "later:close").status == 404
    server.host.check_output(
        "cat > %s <<'END'\n"
        "import feature_views\n"
        "from entities import symbol\n"
        "from feast import FeatureView, Field\n"
        "from feast.types import Float64\n"
        "source = feature_views.ohlcv_features.batch_source\n"
        "fields = [Field(name='close', dtype=Float64)]\n"
        "later = FeatureView(name='later', entities=[symbol], source=source, schema=fields)\n"
        "END",
        views,
    )
    try:
        server.host.check_output("cd / && larder apply")
        deadline = time.monotonic() + 30
        while server.read(6566, "ANY", "later:close").status != 200 and time.monotonic() < deadline:
            time.sleep(1)
        assert server.read(6566, "ANY", "later:close").status == 200
        assert pids(server, "feature-server@1") == before
    finally:
        server.host.check_output("rm %s && cd / && larder apply", views)
