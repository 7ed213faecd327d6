"""Greet whoever sends the token."""

from __future__ import annotations

import hmac
import http.server
import os
import ssl
import sys
from pathlib import Path

CREDENTIALS = Path(os.environ["CREDENTIALS_DIRECTORY"])
BEARER = f"Bearer {(CREDENTIALS / 'token').read_text()}"


class Greeting(http.server.BaseHTTPRequestHandler):
    """Answers a GET with the right token by 200, and any other by 401."""

    def do_GET(self) -> None:
        known = hmac.compare_digest(self.headers.get("Authorization", ""), BEARER)
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(b"Hello!\n" if known else b"")


server = http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Greeting)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(CREDENTIALS / "tls.crt", CREDENTIALS / "tls.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
