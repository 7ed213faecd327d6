"""After runs with other values and other secrets under load (side_effect.yml, which has counted the failures)."""

import ssl

import pytest

testinfra_hosts = ["ansible://gateway1"]
READER, WRITER = "the-third-reader-token", "the-third-writer-token"


def test_the_new_instance_takes_its_part(gateway, hosts):
    def served() -> dict[str, int]:
        script = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
            "s.sendall(b'show stat\\n'); print(s.makefile().read())"
        )
        rows = [line.split(",") for line in hosts["gateway1"].check_output(f'python3 -c "{script}"').splitlines()]
        return {row[1].split(":")[1]: int(row[7]) for row in rows if row[0] == "feature_servers" and ":" in row[1]}

    before = served()
    assert set(before) == {"6566", "6567", "6568"}
    for _ in range(30):
        assert gateway.read("ANY", READER).status == 200
    assert all(after > before[port] for port, after in served().items())


def test_the_new_limit_holds(gateway):
    assert gateway.ask("POST", "/get-online-features", READER, "x" * 20001).status == 413
    assert gateway.ask("POST", "/get-online-features", READER, "x" * 20000).status == 422


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


def test_the_new_certificate_is_served_and_the_one_before_is_gone(gateway, hosts):
    connection = gateway.connect()
    connection.connect()
    served = ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True))
    files = hosts["gateway1"].check_output("find /etc/larder/tls/gateway -type f -name tls.crt").split()
    assert len(files) == 1
    assert hosts["gateway1"].file(files[0]).content_string.split() == served.split()
    key = hosts["gateway1"].file(files[0].replace("tls.crt", "tls.key"))
    assert (key.user, key.group, key.mode) == ("root", "haproxy", 0o640)


def test_older_tls_is_there_for_who_asks_for_it(gateway):
    old = ssl.create_default_context(cadata=gateway.authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = gateway.connect(old)
    connection.connect()
    assert connection.sock.version() == "TLSv1.2"
