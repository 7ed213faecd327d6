#!/usr/bin/python3
"""Insert one row after the other, until SIGTERM; then tell which rows the server acknowledged, and what failed.

Standard input: how to connect, as libpq has it. Arguments: the rows' symbol, and the file for the answer.
"""

import json
import signal
import sys
import time
from pathlib import Path

import psycopg

INSERT = (
    "INSERT INTO market_data.ohlcv_daily (symbol, event_timestamp, open, high, low, close, adjusted_close, volume)"
    " VALUES (%s, '2026-01-01Z'::timestamptz + %s * interval '1 second', 1, 1, 1, 1, 1, 1)"
)
symbol, report = sys.argv[1:]
conninfo = sys.stdin.read()
acknowledged, failures, gap = [], [], 0.0
stopped = False


def stop(*_arguments):
    global stopped
    stopped = True


signal.signal(signal.SIGTERM, stop)
connection, number, last = None, 0, time.monotonic()
while not stopped:
    number += 1
    try:
        connection = connection or psycopg.connect(conninfo, autocommit=True)
        connection.execute(INSERT, [symbol, number])
    except psycopg.Error as error:
        failures.append(" ".join(str(error).split()))
        connection = None
        time.sleep(0.1)
        continue
    now = time.monotonic()
    gap, last = max(gap, now - last), now
    acknowledged.append(number)
    time.sleep(0.02)
gap = max(gap, time.monotonic() - last)
Path(report).write_text(json.dumps({"acknowledged": acknowledged, "failures": failures, "gap": gap}))
