"""Hold one session per name in the background and write down which of them live, for up to ten minutes.

The request on standard input is JSON: connections by name, as redis-py's arguments, and the file to write.
"""

import json
import os
import sys
import time
from pathlib import Path

import redis

request = json.load(sys.stdin)
sessions = {}
for name, connection in request["connections"].items():
    sessions[name] = redis.SSLConnection(**connection)
    sessions[name].connect()

if os.fork():
    os._exit(0)  # without redis-py's clean-up, which would close the sessions for both
os.setsid()
for descriptor in range(3):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)

alive = dict.fromkeys(sessions, True)
state = Path(request["state"])
deadline = time.monotonic() + 600
while any(alive.values()) and time.monotonic() < deadline:
    for name in [name for name in alive if alive[name]]:
        try:
            sessions[name].send_command("PING")
            sessions[name].read_response()
        except redis.ConnectionError:
            alive[name] = False
    new = state.with_suffix(".new")
    new.write_text(json.dumps({"pid": os.getpid(), "time": time.time(), "alive": alive}))
    new.replace(state)
    time.sleep(0.2)
