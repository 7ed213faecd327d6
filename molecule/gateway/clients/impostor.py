"""Stand in for the health checks of the instance on port 6568, all with 200, and note each request in /run/impostor.

The certificate and its key are in /run/impostor.pem.
"""

import http.server
import ssl
from pathlib import Path

NOTES = Path("/run/impostor")


class Impostor(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with NOTES.open("a") as notes:
            notes.write(f"{self.command} {self.path}\n")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def finish_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        super().finish_request(context.wrap_socket(request, server_side=True), client_address)


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/run/impostor.pem")
NOTES.write_text("")
Server(("0.0.0.0", 6588), Impostor).serve_forever()
