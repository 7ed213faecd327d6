"""Say PING as a client that has no password: a JSON request on standard input, what came of it on standard output.

With "tls": false it speaks plainly, as a client of a Redis without TLS does.
"""

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
    connection.sendall(b"PING\r\n")
    print(connection.recv(1000).decode() or "closed")
except OSError as error:
    print(f"{type(error).__name__}: {error}")
