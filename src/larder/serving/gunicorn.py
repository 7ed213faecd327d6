"""How gunicorn runs one instance of the feature server (`gunicorn --config python:larder.serving.gunicorn`).

What differs from instance to instance comes from its unit's environment; there is no secret in it.
"""

import asyncio
import json
import os
import ssl
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]


def _tls(_: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """TLS 1.3, and no older one: gunicorn has no setting for it that reaches uvicorn."""
    context = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class Together:
    """A transport that sends at once what is written at once.

    uvicorn writes an answer's head and its body apart. A process that is killed in between has begun an answer, which
    the gateway then cannot ask of another instance.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.held: list[bytes] = []
        self.loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.held:
            self.loop.call_soon(self.flush)
        self.held.append(data)

    def flush(self) -> None:
        held, self.held = b"".join(self.held), []
        if held:
            self.transport.write(held)

    def close(self) -> None:
        self.flush()
        self.transport.close()


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(Together(transport))  # type: ignore[arg-type] # what uvicorn uses of one

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as every other error is answered."""
        body = json.dumps({"detail": msg}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class Worker(UvicornWorker):  # type: ignore[misc] # untyped
    # No web sockets: nobody needs Feast's demonstration chat, and their refusals have no body.
    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {"ssl_context_factory": _tls, "http": Protocol, "ws": "none"}


# Without preload each worker builds its own store after the fork: two processes must not share one PostgreSQL socket.
wsgi_app = "larder.serving.application:create_app()"
worker_class = "larder.serving.gunicorn.Worker"
preload_app = False
workers = int(os.environ["LARDER_WORKERS"])
# The first instance listens on this port, the others follow.
bind = f"{os.environ['LARDER_ADDRESS']}:{int(os.environ['LARDER_PORT']) + int(os.environ['LARDER_INSTANCE']) - 1}"
# Nobody is heard without a certificate of the stack's own authority.
certfile = f"{os.environ['LARDER_CERTIFICATE']}/tls.crt"
keyfile = f"{os.environ['LARDER_CERTIFICATE']}/tls.key"
ca_certs = f"{os.environ['LARDER_CERTIFICATE']}/ca.crt"
cert_reqs = ssl.CERT_REQUIRED

loglevel = os.environ.get("LARDER_LOG_LEVEL", "info")
accesslog = "-" if loglevel == "debug" else None

# A recycled worker resets connections.
max_requests = 0
control_socket_disable = True
# Longer than HAProxy keeps an idle connection, so that HAProxy is the one that closes it.
keepalive = 75
graceful_timeout = 20
worker_tmp_dir = os.environ["RUNTIME_DIRECTORY"]

# Where the workers show each other what they have counted: whichever is asked for its metrics tells those of all.
if workers > 1:
    os.environ["LARDER_METRICS"] = worker_tmp_dir

# gunicorn would tell systemd that it is ready before its workers are: larder.serving.application tells it.
os.environ["LARDER_NOTIFY_SOCKET"] = os.environ.pop("NOTIFY_SOCKET", "")
