"""Send each request's body a moment after its headers, as a slow network does; print what failed, as JSON.

A gateway that passes such a request on before all of it has come cannot send it to another instance when one dies.
"""

import argparse
import json
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

BODY = json.dumps({"entities": {"symbol": ["ANY"]}, "features": ["market_features:close"]}).encode()

parser = argparse.ArgumentParser()
parser.add_argument("--gateway", type=urlsplit)
parser.add_argument("--ca")
parser.add_argument("--tokens", type=Path)
parser.add_argument("--stop", type=Path)
to = parser.parse_args()
trusting = ssl.create_default_context(cafile=to.ca)
failures: list[str] = []
requests: list[float] = []


def connect() -> ssl.SSLSocket:
    stream = socket.create_connection((to.gateway.hostname, to.gateway.port), timeout=60)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return trusting.wrap_socket(stream, server_hostname=to.gateway.hostname)


def ask(stream: ssl.SSLSocket) -> bytes:
    headers = {
        "Host": to.gateway.netloc,
        "Authorization": f"Bearer {json.loads(to.tokens.read_text())['reader']}",
        "Content-Type": "application/json",
        "Content-Length": len(BODY),
    }
    lines = ["POST /get-online-features HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    stream.sendall("\r\n".join(lines).encode())
    time.sleep(0.02)
    stream.sendall(BODY)
    head, _, rest = stream.recv(65536).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise OSError(repr(head[:40]))
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(rest) < length and (more := stream.recv(65536)):
        rest += more
    json.loads(rest)
    return head


def client() -> None:
    stream = connect()
    while not to.stop.exists():
        requests.append(time.time())
        try:
            over = b"connection: close" in ask(stream).lower()
        except (OSError, ValueError) as error:
            failures.append(f"{requests[-1]} {type(error).__name__} {error}")
            over = True
        if over:
            stream.close()
            stream = connect()
        time.sleep(0.03)


threads = [threading.Thread(target=client) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
json.dump({"requests": len(requests), "failed": len(failures), "failures": failures[:20]}, sys.stdout)
sys.exit(1 if failures else 0)
