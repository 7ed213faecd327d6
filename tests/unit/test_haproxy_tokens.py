"""How the module haproxy_tokens reads what HAProxy answers, and which tokens it leaves alone."""

import hashlib
import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "ansible/plugins/modules/haproxy_tokens.py"
spec = importlib.util.spec_from_file_location("haproxy_tokens", PLUGIN)
assert spec
assert spec.loader
haproxy_tokens = importlib.util.module_from_spec(spec)
spec.loader.exec_module(haproxy_tokens)

OLD, NEW = (hashlib.sha256(token).hexdigest() for token in (b"old", b"new"))
PROCESSES = """#<PID>          <type>          <reloads>       <uptime>        <version>
2186            master          1 [failed: 0]   0d00h11m18s     3.0.11-1+deb13u5
# workers
2290            worker          0               0d00h00m18s     3.0.11-1+deb13u5
# old workers
2190            worker          1               0d00h11m18s     3.0.11-1+deb13u5
# programs

"""


def test_processes_that_a_reload_left_behind_are_updated() -> None:
    assert haproxy_tokens.parse_workers(PROCESSES) == [2290, 2190]


@pytest.mark.parametrize("prefix", ["", "0x7f1c30231c80 "])
def test_a_map_is_read_from_the_file_and_from_a_process(prefix: str) -> None:
    assert haproxy_tokens.parse_map(f"{prefix}{OLD} reader\n{prefix}{NEW} writer\n\n") == {OLD: "reader", NEW: "writer"}


def test_what_is_written_is_what_is_read() -> None:
    tokens = {OLD: "reader", NEW: "writer"}
    assert haproxy_tokens.parse_map(haproxy_tokens.render(tokens)) == tokens


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_a_use_names_the_token_and_the_client(address: str) -> None:
    answer = (
        f"# table: token_use, type: string, size:10240, used:1\n0x7f: key={OLD}@{address} use=0 exp=59000 shard=0\n\n"
    )
    assert haproxy_tokens.parse_uses(answer) == [(OLD, address)]


def test_an_uptime_is_in_seconds() -> None:
    assert haproxy_tokens.parse_uptime("Name: HAProxy\nUptime: 0d 0h11m17s\nUptime_sec: 677\n") == 677


@contextmanager
def master(path: Path, tokens: dict[str, str]) -> Iterator[list[str]]:
    """Answer as HAProxy's master does that has one worker with these tokens; yield the commands that change them."""
    changes: list[str] = []

    def answer(command: str) -> str:
        words = command.split()
        if words[1] == "show" and words[2] == "map":
            return "".join(f"0x1 {key} {role}\n" for key, role in tokens.items())
        changes.append(" ".join(words[1:]))
        return "\n"

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection:
                if command := connection.makefile().read():
                    connection.sendall(answer(command).encode())
                else:
                    return

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield changes
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(str(path))
        thread.join()


@pytest.mark.parametrize("check", [False, True])
def test_a_process_gets_only_the_differences(tmp_path: Path, check: bool) -> None:
    with master(tmp_path / "master.sock", {OLD: "reader", "same": "writer", "moved": "reader"}) as changes:
        haproxy = haproxy_tokens.HAProxy(str(tmp_path / "master.sock"))
        assert haproxy.tell(1, "map", {"same": "writer", "moved": "writer", NEW: "reader"}, check=check)
    wanted = [f"add map map {NEW} reader", "set map map moved writer", f"del map map {OLD}"]
    assert changes == ([] if check else wanted)


def test_a_process_with_an_equal_map_gets_no_command(tmp_path: Path) -> None:
    with master(tmp_path / "master.sock", {NEW: "reader"}) as changes:
        assert not haproxy_tokens.HAProxy(str(tmp_path / "master.sock")).tell(1, "map", {NEW: "reader"}, check=False)
    assert changes == []


def test_without_a_process_there_are_no_workers(tmp_path: Path) -> None:
    assert haproxy_tokens.HAProxy(str(tmp_path / "none.sock")).workers() == []
