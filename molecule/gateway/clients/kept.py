"""Read over one connection, with one token, until that is refused; print what was answered, as JSON.

Standard input: {"address": ..., "ca": ..., "token": ...}
"""

import http.client
import json
import ssl
import sys
import time

to = json.load(sys.stdin)
connection = http.client.HTTPSConnection(
    to["address"], 8443, timeout=60, context=ssl.create_default_context(cadata=to["ca"])
)
connection.connect()
first = connection.sock
statuses = []
while not statuses or (statuses[-1] == 200 and len(statuses) < 1000):
    connection.request("GET", "/ready", headers={"Authorization": f"Bearer {to['token']}"})
    response = connection.getresponse()
    response.read()
    statuses.append(response.status)
    time.sleep(0.1)
print(json.dumps({"good": statuses.count(200), "last": statuses[-1], "kept": connection.sock in (first, None)}))
