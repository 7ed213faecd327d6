#!/usr/bin/env python3
"""Push a quote and insert a row on this host, again and again, and print what was acknowledged.

    python3 acknowledged.py https://192.0.2.11:8443 /tmp/stop

Beside this file are load.py, ca.crt and tokens.json; the table `acknowledged (number int)` is in the database `feast`.
Each line has `push` (through the gateway) or `row` (by PostgreSQL's socket), and the number that was acknowledged.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

from load import Client, Watched

HERE = Path(__file__).parent
SECONDS = 3.0


def main() -> None:
    gateway, stop = sys.argv[1], Path(sys.argv[2])
    trusted = Watched(HERE / "ca.crt", lambda path: ssl.create_default_context(cafile=str(path)))
    client = Client(gateway, trusted, Watched(HERE / "tokens.json", lambda path: json.loads(path.read_text())), SECONDS)
    number = 0
    while not stop.exists():
        number += 1
        row: dict[str, object] = dict.fromkeys(("open", "high", "low", "bid", "ask", "spread"), 1.0)
        row |= {"symbol": f"ACKNOWLEDGED-{number}", "close": float(number), "volume": 1}
        row |= dict.fromkeys(("event_timestamp", "created"), datetime.now(UTC).isoformat())
        body = {"push_source_name": "market_data_push_source", "df": {name: [value] for name, value in row.items()}}
        with suppress(OSError, HTTPException, ValueError):
            client.post("/push", body, "writer")
            print("push", number, flush=True)
        insert = ["psql", "-XqAtd", "feast", "-c", f"INSERT INTO acknowledged VALUES ({number})"]
        with suppress(subprocess.SubprocessError):
            subprocess.run(
                ["runuser", "-u", "postgres", "--", *insert], check=True, timeout=SECONDS, capture_output=True, cwd="/"
            )
            print("row", number, flush=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
