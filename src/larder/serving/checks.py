"""The way in of gateways and Prometheus: `GET /ready` and `GET /metrics` on a port of its own, answered by threads.

A worker that is busy is not a dead one: while it reads for clients, its health checks are answered all the same, and
each of them reads a feature over a connection of its own. What does look dead is a worker whose event loop has stood
still for longer than clients wait.
"""

import asyncio
import http.server
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

# Longer than the gateway waits for an answer by default.
STUCK_SECONDS = 20
BEAT_SECONDS = 0.5
# Of a check's connection.
TIMEOUT_SECONDS = 5
JSON = "application/json"

Check = Callable[[str], tuple[int, dict[str, Any]]]
# By path, what answers a GET: it takes the asking host's address, and returns status, content type and body.
Routes = Mapping[str, Callable[[str], tuple[int, str, bytes]]]


class Checks:
    """Answers health checks until it is closed."""

    def __init__(
        self, address: tuple[str, int], tls: ssl.SSLContext | None, check: Check, metrics: Callable[[], bytes]
    ) -> None:
        """Listen; `check` takes the asking host's address and returns status and body. Both are called in threads."""
        self.beaten = time.monotonic()
        self.check = check
        routes: Routes = {"/ready": self.ready, "/metrics": lambda _: (200, CONTENT_TYPE_LATEST, metrics())}
        self.server = Server(address, tls, routes)

    async def beat(self) -> None:
        """Note again and again that the event loop goes round."""
        while True:
            self.beaten = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)

    def answer(self, client: str) -> tuple[int, dict[str, Any]]:
        if time.monotonic() - self.beaten > STUCK_SECONDS:
            return 503, {"status": "stuck"}
        return self.check(client)

    def ready(self, client: str) -> tuple[int, str, bytes]:
        status, answer = self.answer(client)
        return status, JSON, json.dumps(answer).encode()

    def close(self) -> None:
        self.server.close()


class Server(http.server.ThreadingHTTPServer):
    """Answers GET at some paths in threads, until it is closed."""

    # The workers of an instance share its port.
    allow_reuse_port = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext | None, routes: Routes) -> None:
        super().__init__(address, Handler)
        self.tls, self.routes = tls, routes
        threading.Thread(target=self.serve_forever, name=f"port {address[1]}", daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's own thread: a handshake must not hold up the next one.
        request.settimeout(TIMEOUT_SECONDS)
        if self.tls:
            request = self.tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hangs up, or shows no certificate, is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        route = self.server.routes.get(self.path)
        self.send(*(route(self.client_address[0]) if route else (404, JSON, b'{"detail": "not found"}')))

    def send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 # the base class's name
        """gunicorn logs no checks either."""
