"""Say PING as a client that has no password: a JSON request on standard input, what came of it on standard output.

With "tls": false it speaks plainly, as a client of a Redis without TLS does; with "show": "certificate" it prints the
serial number of the server's certificate.
"""

import contextlib
import json
import socket
import ssl
import sys

request = json.load(sys.stdin)
try:
    connection = socket.create_connection((request["host"], request["port"]), timeout=3)
    if request["tls"]:
        context = ssl.create_default_context(cafile=request["authorities"])
        context.maximum_version = ssl.TLSVersion[request["newest"]]
        if request["certificate"]:
            context.load_cert_chain(request["certificate"] + "/tls.crt", request["certificate"] + "/tls.key")
        connection = context.wrap_socket(connection, server_hostname=request["name"])
        # In TLS 1.3 a client is connected before the server has judged its certificate: a refusal comes now.
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):
            connection.recv(1)
        connection.settimeout(3)
    connection.sendall(b"PING\r\n")
    answer = connection.recv(1000).decode() or "closed"
    print(connection.getpeercert()["serialNumber"] if request["show"] == "certificate" else answer)
except OSError as error:
    print(f"{type(error).__name__}: {error}")
