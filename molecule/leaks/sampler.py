"""See what is there for a moment only: every process' arguments and environment, and short-lived files.

Runs on the controller and, sent over SSH, on hosts: ``sampler.py DIRECTORY...`` watches the files in those directories.
Each thing that was not seen before is a line of JSON on standard output; it ends with its standard input.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterator

PERIOD = 0.05
# A process changes its arguments just after its fork, so look often at first and rarely later.
YOUNG, RARELY = 2.0, 1.0
LARGEST = 4 * 2**20


def tell(kind: str, content: bytes, path: str = "", mode: str = "") -> None:
    record = {"kind": kind, "content": base64.b64encode(content).decode(), "path": path, "mode": mode}
    print(json.dumps(record), flush=True)


def contents(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - twenty times a second for every process
            return file.read(LARGEST)
    except OSError:
        return b""


class Processes:
    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        self._seen: set[tuple[str, bytes]] = set()

    def look(self, now: float) -> None:
        present = {pid for pid in os.listdir("/proc") if pid.isdigit()}  # noqa: PTH208
        for pid in self._since.keys() - present:
            del self._since[pid], self._asked[pid]
        for pid in present:
            since = self._since.setdefault(pid, now)
            if now - since > YOUNG and now - self._asked[pid] < RARELY:
                continue
            self._asked[pid] = now
            for kind in ("cmdline", "environ"):
                content = contents(f"/proc/{pid}/{kind}")
                if content and (kind, content) not in self._seen:
                    self._seen.add((kind, content))
                    tell(kind, content)


class Files:
    def __init__(self, directories: list[str]) -> None:
        self._directories = directories
        self._seen: set[tuple[str, int, int, int]] = set()

    def _walk(self) -> Iterator[str]:
        for directory in self._directories:
            for parent, _, names in os.walk(directory):
                yield from (f"{parent}/{name}" for name in names)

    def look(self) -> None:
        for path in self._walk():
            try:
                status = os.lstat(path)
            except OSError:
                continue
            version = (path, status.st_ino, status.st_size, status.st_mtime_ns)
            if stat.S_ISREG(status.st_mode) and version not in self._seen:
                self._seen.add(version)
                if content := contents(path):
                    tell("file", content, path, f"{stat.S_IMODE(status.st_mode):04o}")


def main() -> None:
    # The sampler takes a higher priority than what it watches, where it may.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    processes, files = Processes(), Files(sys.argv[1:])
    rounds, started = 0, time.monotonic()
    while True:
        began = time.monotonic()
        processes.look(began)
        files.look()
        rounds += 1
        rest = max(0.0, PERIOD - (time.monotonic() - began))
        if select.select([sys.stdin], [], [], rest)[0] and not sys.stdin.read(1):
            break
    tell("period", f"{(time.monotonic() - started) / rounds:.3f}".encode())


if __name__ == "__main__":
    main()
