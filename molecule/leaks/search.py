"""Search files for patterns. Runs on the controller and, sent over SSH, on hosts, with Python's own library alone.

Standard input is JSON: ``patterns`` (base64), ``roots``, perhaps ``pruned`` (paths) and ``since`` (seconds since 1970:
a file whose inode has not changed since holds nothing newer). The patterns stay in memory, so that the search leaves
nothing that it would find. Standard output is JSON: ``files``, how many were read, and ``hits``.
"""

from __future__ import annotations

import base64
import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def name(database: Any, number: int, field: int = 0) -> str:
    try:
        return str(database(number)[field])
    except KeyError:
        return str(number)


def found_files(roots: list[str], pruned: Sequence[str], since: float | None) -> bytes:
    command = ["find", *roots]
    for path in pruned:
        command += ["-path", path, "-prune", "-o"]
    command += ["-type", "f", "-size", "+0"]
    if since is not None:
        command += ["-newerct", f"@{since:.3f}"]
    # A file may vanish while find walks; that is no error.
    result = subprocess.run([*command, "-print0"], capture_output=True)
    errors = [line for line in result.stderr.splitlines() if b"No such file" not in line]
    if errors:
        raise SystemExit(b"\n".join(errors).decode(errors="replace"))
    return result.stdout


def search(
    patterns: list[bytes], roots: list[str], pruned: Sequence[str] = (), since: float | None = None
) -> dict[str, Any]:
    memory = os.memfd_create("patterns")
    with os.fdopen(memory, "wb", closefd=False) as file:
        file.write(b"\n".join(patterns))
    files = found_files(roots, pruned, since)
    grep = [
        "grep",
        "-F",
        "-a",
        "-o",
        "-H",
        "-Z",
        "-s",
        "--line-buffered",
        "-f",
        f"/proc/{os.getpid()}/fd/{memory}",
        "--",
    ]
    result = subprocess.run(
        ["xargs", "-0", "-r", "-n", "1000", "-P", "2", *grep],
        input=files,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    # 123: grep found nothing in some batch, or a file was gone.
    if result.returncode not in {0, 123}:
        raise SystemExit(f"xargs ended with {result.returncode}")
    matches: dict[bytes, set[bytes]] = {}
    for line in result.stdout.split(b"\n"):
        path, separator, match = line.partition(b"\0")
        if separator:
            matches.setdefault(path, set()).add(match)
    return {"files": files.count(b"\0"), "hits": [hit(path, found) for path, found in sorted(matches.items())]}


def hit(path: bytes, found: set[bytes]) -> dict[str, Any]:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        owner, mode = "gone", "gone"
    else:
        owner = f"{name(pwd.getpwuid, status.st_uid)}:{name(grp.getgrgid, status.st_gid)}"
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
    return {
        "path": os.fsdecode(path),
        "owner": owner,
        "mode": mode,
        "matches": [base64.b64encode(match).decode() for match in sorted(found)],
    }


if __name__ == "__main__":
    request = json.load(sys.stdin)
    request["patterns"] = [base64.b64decode(pattern) for pattern in request["patterns"]]
    json.dump(search(**request), sys.stdout)
