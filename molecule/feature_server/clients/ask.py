"""Ask an instance one thing, with a client certificate; request and certificate come on standard input."""

import json
import ssl
import sys
import time
import urllib.error
import urllib.request

request = json.load(sys.stdin)
context = ssl.create_default_context(cafile=f"{request['certificate']}/ca.crt")
context.load_cert_chain(f"{request['certificate']}/tls.crt", f"{request['certificate']}/tls.key")
body = None if request["body"] is None else json.dumps(request["body"]).encode()
started = time.monotonic()
try:
    response = urllib.request.urlopen(
        urllib.request.Request(request["url"], body, {"Content-Type": "application/json"}),
        timeout=60,
        context=context,
    )
except urllib.error.HTTPError as error:
    response = error
text = response.read().decode()
print(json.dumps([response.status, text, time.monotonic() - started]))
