"""Read and push through the gateway until /tmp/load.stop exists; print what was answered, as JSON.

Standard input: {"host": ..., "port": ..., "reader": ..., "writer": ...}
"""

import http.client
import json
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

TO = json.load(sys.stdin)
STOP = Path("/tmp/load.stop")
READ = {"entities": {"symbol": ["LOAD"]}, "features": ["market_features:close"]}
answers: Counter[str] = Counter()
seconds: list[float] = []
failures: list[str] = []


def push() -> dict[str, object]:
    now = datetime.now(UTC).isoformat()
    row = dict.fromkeys(("open", "high", "low", "close", "bid", "ask", "spread"), 1.0)
    row |= {"symbol": "LOAD", "event_timestamp": now, "created": now, "volume": 1}
    return {"push_source_name": "market_data_push_source", "df": {k: [v] for k, v in row.items()}}


def client(path: str, token: str, pause: float, *, keep: bool) -> None:
    connection = http.client.HTTPConnection(TO["host"], TO["port"], timeout=60)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    while not STOP.exists():
        started = time.monotonic()
        try:
            connection.request("POST", path, json.dumps(push() if path == "/push" else READ), headers)
            response = connection.getresponse()
            answer = f"{path} {response.status}"
            body = response.read()
            if response.status != 200:
                failures.append(f"{datetime.now(UTC)} {answer} {body[:200]!r}")
        except (OSError, http.client.HTTPException) as error:
            answer = f"{path} {type(error).__name__}"
            failures.append(f"{datetime.now(UTC)} {answer}")
            connection.close()
        answers[answer] += 1
        seconds.append(time.monotonic() - started)
        if not keep:
            connection.close()
        time.sleep(pause)


STOP.unlink(missing_ok=True)
threads = [
    threading.Thread(target=client, args=("/get-online-features", TO["reader"], 0.01), kwargs={"keep": True}),
    threading.Thread(target=client, args=("/get-online-features", TO["reader"], 0.01), kwargs={"keep": False}),
    threading.Thread(target=client, args=("/push", TO["writer"], 0.05), kwargs={"keep": True}),
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
seconds.sort()
print(
    json.dumps(
        {
            "requests": len(seconds),
            "answers": answers,
            "failures": failures,
            "p50": seconds[len(seconds) // 2],
            "p99": seconds[len(seconds) * 99 // 100],
            "max": seconds[-1],
        }
    )
)
