"""After runs with other values and other secrets under load (side_effect.yml, which has counted the failures)."""

import csv
import shlex
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

testinfra_hosts = ["ansible://gateway1"]
READER, WRITER = "the-third-reader-token", "the-third-writer-token"


IMPOSTOR = (Path(__file__).parents[1] / "clients/impostor.py").read_text()


def instances(hosts, field: str) -> dict[str, str]:
    """Return what the gateway says of each instance that reads, by port."""
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
        "s.sendall(b'show stat\\n'); print(s.makefile().read())"
    )
    rows = csv.DictReader(hosts["gateway1"].check_output(f'python3 -c "{script}"').splitlines())
    return {
        row["svname"].split(":")[1]: row[field]
        for row in rows
        if row["# pxname"] == "feature_servers" and ":" in row["svname"]
    }


def test_the_new_instance_gets_requests(gateway, hosts):
    before = instances(hosts, "stot")
    assert set(before) == {"6566", "6567", "6568"}
    for _ in range(30):
        assert gateway.read("ANY", READER).status == 200
    assert all(int(after) > int(before[port]) for port, after in instances(hosts, "stot").items())


def test_further_lines_of_a_section_are_in_force(gateway):
    assert gateway.read("ANY", READER).headers["larder-test"] == "further"


OF_SERVER1 = "cat /etc/larder/tls/feast/current/tls.*"
SELF_SIGNED = "openssl req -quiet -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout - -subj /CN=server1"


@contextmanager
def impostor(hosts, certificate: str, tls: str = "TLSv1_3", unanswered: str = "-") -> Iterator[Callable[[], str]]:
    """Let the impostor stand in for the third instance; yield what it has noted."""
    server = hosts["server1"]
    server.check_output("systemctl stop feature-server@3")
    try:
        server.check_output(f"(umask 077; echo {shlex.quote(certificate)} > /run/impostor.pem)")
        server.check_output("truncate --size=0 /run/impostor")
        server.check_output(
            f"systemd-run --unit=impostor python3 -c {shlex.quote(IMPOSTOR)} {tls} {unanswered} 6568 6588"
        )
        yield lambda: server.file("/run/impostor").content_string
    finally:
        server.run("systemctl stop impostor; rm -f /run/impostor.pem")
        server.check_output("systemctl start feature-server@3")


@pytest.mark.parametrize(
    ("host", "certificate", "tls", "status"),
    [
        ("server1", OF_SERVER1, "TLSv1_3", "L7OK"),
        ("server1", OF_SERVER1, "TLSv1_2", "L6RSP"),
        ("gateway1", "cat /etc/larder/tls/gateway/current/tls.*", "TLSv1_3", "L6RSP"),
        ("server1", SELF_SIGNED, "TLSv1_3", "L6RSP"),
    ],
    ids=["its own name", "older TLS", "another host's name", "no CA"],
)
def test_an_instance_is_trusted_only_by_its_name_the_stacks_ca_and_tls_1_3(hosts, host, certificate, tls, status):
    with impostor(hosts, hosts[host].check_output(certificate), tls) as noted:
        expected = (status, status == "L7OK")
        end = time.monotonic() + 60
        while (found := (instances(hosts, "check_status")["6568"], "GET /ready" in noted())) != expected:
            assert time.monotonic() < end, found
            time.sleep(1)


def test_no_instance_receives_a_token(gateway, hosts):
    reads = [("GET", "/health", None), ("POST", "/get-online-features", {})]
    with impostor(hosts, hosts["server1"].check_output(OF_SERVER1)) as noted:
        end = time.monotonic() + 60
        while any(f"{method} {path}\n" not in noted() for method, path, _ in reads) and time.monotonic() < end:
            for method, path, body in reads:
                gateway.ask(method, path, READER, body, headers={"X-Claim": "passed on"})
        told = noted()
    for method, path, _ in reads:
        assert f"{method} {path}\n" in told
    assert "x-claim: passed on" in told.lower()
    assert "authorization" not in told.lower()
    assert READER not in told


def test_a_read_that_an_instance_leaves_unanswered_is_answered_by_another_one(gateway, hosts):
    with impostor(hosts, hosts["server1"].check_output(OF_SERVER1), unanswered="POST") as noted:
        answers: list[int] = []
        end = time.monotonic() + 60
        while noted().count("POST /get-online-features\n") < 3 and time.monotonic() < end:
            answers.append(gateway.read("ANY", READER).status)
        assert noted().count("POST /get-online-features\n") >= 3
    assert set(answers) == {200}


def test_the_new_body_limit_holds(gateway):
    assert gateway.ask("POST", "/get-online-features", READER, "x" * 20001).status == 413
    assert gateway.ask("POST", "/get-online-features", READER, "x" * 20000).status in (400, 422)


def test_a_client_with_few_waiting_requests_comes_before_one_with_many(gateway, hosts):
    server, units = hosts["server1"], "feature-server@1 feature-server@2 feature-server@3"
    working, waiting = 3 * 2, 30  # gateway_server_small_reads of each instance
    order: list[str] = []

    def read(token: str) -> int:
        status = gateway.read("ANY", token).status
        order.append(token)
        return status

    with ThreadPoolExecutor(working + waiting + 1) as clients:
        server.check_output(f"systemctl kill --signal=STOP {units}")
        try:
            many = [clients.submit(read, READER) for _ in range(working + waiting)]
            time.sleep(0.3)  # both are less than the second after which the gateway tries another instance
            few = clients.submit(read, WRITER)
            time.sleep(0.3)
            assert order == []
        finally:
            server.check_output(f"systemctl kill --signal=CONT {units}")
    assert {future.result() for future in [*many, few]} == {200}
    # The reader's that an instance worked on already are not called back, and some answers overtake others.
    assert order.index(WRITER) < working + waiting / 3


def test_the_new_tokens_are_valid(gateway):
    assert gateway.push("ROTATED", 3.5, WRITER).status == 200
    assert gateway.read("ROTATED", READER).json["results"][1]["values"] == [3.5]
    assert gateway.push("ROTATED", 3.5, READER).status == 403


@pytest.mark.parametrize(
    "token", [None, "wrong", "reader", "writer", "the-second-reader-token", "the-second-writer-token"]
)
def test_a_former_token_is_refused(gateway, token):
    token = gateway.tokens.get(token, token)
    assert gateway.read("ANY", token).status == 401
    assert gateway.push("ANY", 1.0, token).status == 401


def test_the_new_certificate_is_served_and_the_former_one_is_removed(gateway, hosts):
    connection = gateway.connect()
    connection.connect()
    served = ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True))
    files = hosts["gateway1"].check_output("find /etc/larder/tls/gateway -type f -name tls.crt").split()
    assert len(files) == 1
    assert hosts["gateway1"].file(files[0]).content_string.split() == served.split()
    key = hosts["gateway1"].file(files[0].replace("tls.crt", "tls.key"))
    assert (key.user, key.group, key.mode) == ("root", "haproxy", 0o640)


def test_older_tls_can_be_allowed_by_a_variable(gateway):
    old = ssl.create_default_context(cadata=gateway.authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = gateway.connect(old)
    connection.connect()
    assert connection.sock.version() == "TLSv1.2"
