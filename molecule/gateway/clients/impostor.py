"""Stand in for an instance: answer everything with 200, and note each request, with its headers, in /run/impostor.

Arguments: the newest TLS version to speak (TLSv1_2 or TLSv1_3), the method of requests that get no answer, as from an
instance that dies (POST, or - for none), and the ports. The certificate and its key are in /run/impostor.pem.
"""

import http.server
import ssl
import sys
import threading
from pathlib import Path

NOTES = Path("/run/impostor")


class Impostor(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with NOTES.open("a") as notes:
            notes.write(f"{self.command} {self.path}\n{self.headers}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == unanswered:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815 # the base class's name


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def finish_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        super().finish_request(context.wrap_socket(request, server_side=True), client_address)


newest, unanswered, *ports = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.maximum_version = ssl.TLSVersion[newest]
context.load_cert_chain("/run/impostor.pem")
NOTES.write_text("")
for port in map(int, ports):
    threading.Thread(target=Server(("0.0.0.0", port), Impostor).serve_forever).start()
