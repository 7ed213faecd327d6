"""After a run with other values under load (side_effect.yml, which has counted the failures)."""

testinfra_hosts = ["ansible://gateway1"]


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
        assert gateway.read("ANY", gateway.reader).status == 200
    assert all(after > before[port] for port, after in served().items())


def test_the_new_limit_holds(gateway):
    assert gateway.ask("POST", "/get-online-features", gateway.reader, "x" * 2001).status == 413
    assert gateway.ask("POST", "/get-online-features", gateway.reader, "x" * 2000).status == 422


def test_it_is_still_closed_to_strangers(gateway):
    assert gateway.read("ANY", None).status == 401
    assert gateway.read("ANY", "wrong").status == 401
