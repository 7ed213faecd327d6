"""Ask a gateway again and again over new connections, and print the longest time without an answer, in seconds."""

import http.client
import ssl
import sys
import time
from pathlib import Path

address, stop = sys.argv[1], Path(sys.argv[2])
trusted = ssl.create_default_context(cafile="/tmp/ca.crt")
longest, last, answers = 0.0, time.monotonic(), 0
while not stop.exists():
    connection = http.client.HTTPSConnection(address, 8443, timeout=0.3, context=trusted)
    try:
        connection.request("GET", "/ready")
        connection.getresponse().read()  # 401: it is the gateway that answers, whoever asks
        now = time.monotonic()
        longest, last, answers = max(longest, now - last), now, answers + 1
    except OSError:
        pass
    finally:
        connection.close()
    time.sleep(0.02)
print(answers, max(longest, time.monotonic() - last))
