"""What the gateways know of an instance: it stops, and the next one's turn comes, when all of them have noticed.

An instance's workers share what they have answered in its runtime directory: a file per gateway and answer, with a byte
for each time. `python -m larder.serving.drain` is the unit's ExecStop: it announces that the instance drains, and
returns when the gateways know, a second after the last was told (for what was on its way), or at the deadline.
"""

import os
import socket
import sys
import time
from pathlib import Path

READY, DRAINING = "ready", "draining"
# The gateway sends requests after two good answers (`rise 2`), and no new ones after the first 404.
TIMES = {READY: 2, DRAINING: 1}


class Gateways:
    """The gateways of the inventory, by name or address, as a file lists them: one may join at any time."""

    def __init__(self, directory: Path, listed: Path) -> None:
        self.directory = directory
        self._listed = listed
        self._seen: tuple[int, int] | None = None
        self._by_address: dict[str, str] = {}
        self._names: list[str] = []

    @property
    def names(self) -> list[str]:
        try:
            stat = self._listed.stat()
            if (seen := (stat.st_mtime_ns, stat.st_ino)) != self._seen:
                names = self._listed.read_text(encoding="utf-8").split()
                self._by_address = {address: name for name in names for address in _addresses(name)}
                self._names, self._seen = names, seen
        except OSError:  # a stack without a gateway
            self._by_address, self._names, self._seen = {}, [], None
        return self._names

    def note(self, client: str, answer: str) -> None:
        """Note that a client was given an answer; of others than gateways nothing is kept."""
        name = self._by_address.get(client) if self.names else None
        if name and self._missing(name, answer):
            with self._file(name, answer).open("ab") as file:
                file.write(b".")

    def unaware(self, answer: str) -> list[str]:
        """Return the gateways that have not been given this answer often enough to act on it."""
        return [name for name in self.names if self._missing(name, answer)]

    def _file(self, name: str, answer: str) -> Path:
        return self.directory / f"{answer}-{name}"

    def _missing(self, name: str, answer: str) -> bool:
        try:
            return self._file(name, answer).stat().st_size < TIMES[answer]
        except FileNotFoundError:
            return True


def _addresses(name: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError:  # a gateway without an address asks nothing
        return set()


def directory() -> Path:
    """The instance's runtime directory, which systemd empties whenever it stops."""
    return Path(os.environ["RUNTIME_DIRECTORY"])


def listed() -> Path:
    """The file with the gateways of the inventory."""
    return Path(os.environ.get("LARDER_GATEWAYS", "/etc/larder/gateways"))


def main(deadline: float) -> None:
    gateways = Gateways(directory(), listed())
    # After a crash there is no main process, and nothing to announce.
    if not gateways.names or not os.environ.get("MAINPID"):
        return
    (gateways.directory / DRAINING).touch()
    end = time.monotonic() + deadline
    while gateways.unaware(DRAINING) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)


if __name__ == "__main__":
    main(float(sys.argv[1]))
