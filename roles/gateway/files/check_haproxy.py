"""Ask HAProxy whether it serves, for keepalived: ends with 0 if it does."""

import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(1)
    try:
        connection.connect("/run/haproxy/check.sock")
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        sys.exit(b" 200 " not in connection.recv(64))
    except OSError:
        sys.exit(1)
