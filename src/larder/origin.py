"""What stored rows are told of who wrote them: the host, the code and the lines of the journal."""

import os
import socket
import sys
from pathlib import Path


def host() -> str:
    """The inventory's name of this host, or the one it has itself."""
    return os.environ.get("LARDER_HOST") or socket.gethostname()


def code() -> str:
    """The virtual environment's name: on a host of the stack a digest of Larder and of all that it needs."""
    return Path(sys.prefix).resolve().name


def invocation() -> str | None:
    """What `journalctl _SYSTEMD_INVOCATION_ID=` takes; None outside of a unit."""
    return os.environ.get("INVOCATION_ID")
