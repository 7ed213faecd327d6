"""Read without pause, as a gateway would: from instances that say that they are ready, without a retry.

Standard input: JSON {address, ports, watched, certificate, symbol, value, until}; the watched ports are only asked
whether they are ready. The load ends when the file `until` exists, and prints the number of reads and what was wrong.
"""

import http.client
import json
import ssl
import sys
import threading
import time
from itertools import count
from pathlib import Path

request = json.load(sys.stdin)
context = ssl.create_default_context(cafile=f"{request['certificate']}/ca.crt")
context.load_cert_chain(f"{request['certificate']}/tls.crt", f"{request['certificate']}/tls.key")
body = json.dumps({"entities": {"symbol": [request["symbol"]]}, "features": ["market_features:close"]})
end = Path(request["until"])
good = dict.fromkeys([*request["ports"], *request["watched"]], 0)
reads: list[float] = []
wrong: list[str] = []


def ask(port, method, path, body=None):
    connection = http.client.HTTPSConnection(request["address"], port, timeout=20, context=context)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def check(port):
    """Two good answers bring an instance in; a 404, or three checks without an answer, take it out."""
    bad = 0
    while not end.exists():
        try:
            status, _ = ask(port, "GET", "/ready")
        except OSError:
            status = 0
        bad = 0 if status in (200, 404) else bad + 1
        if status == 200:
            good[port] += 1
        elif status == 404 or bad == 3:
            good[port] = 0
        time.sleep(0.5)


def read(turn):
    for n in count(turn):
        if end.exists():
            return
        ready = [port for port in request["ports"] if good[port] >= 2]
        if not ready:
            wrong.append(f"{time.time():.1f} no instance is ready")
            time.sleep(0.2)
            continue
        port, begun = ready[n % len(ready)], time.monotonic()
        try:
            status, answer = ask(port, "POST", "/get-online-features", body)
            if (status, status == 200 and answer["results"][1]["values"]) != (200, [request["value"]]):
                wrong.append(f"{time.time():.1f} {port} {status} {answer}")
        except (OSError, http.client.HTTPException) as error:
            wrong.append(f"{time.time():.1f} {port} {error!r}")
        reads.append(time.monotonic() - begun)
        time.sleep(0.02)


checks = [threading.Thread(target=check, args=[port]) for port in good]
for thread in checks:
    thread.start()
while not all(times >= 2 for times in good.values()):
    time.sleep(0.1)
readers = [threading.Thread(target=read, args=[turn]) for turn in range(2)]
for thread in readers:
    thread.start()
for thread in [*readers, *checks]:
    thread.join()
print(json.dumps({"reads": len(reads), "wrong": wrong, "slowest": max(reads)}))
