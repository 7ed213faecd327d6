"""Hold one session per user in the background and write down which of them live, for up to ten minutes.

The request on standard input is JSON: host, port, passwords by user, and the file to write.
"""

import json
import os
import sys
import time
from pathlib import Path

import redis

request = json.load(sys.stdin)
sessions = {}
for user, password in request["passwords"].items():
    sessions[user] = redis.Connection(host=request["host"], port=request["port"], username=user, password=password)
    sessions[user].connect()

if os.fork():
    os._exit(0)  # without redis-py's clean-up, which would close the sessions for both
os.setsid()
for descriptor in range(3):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)

alive = dict.fromkeys(sessions, True)
state = Path(request["state"])
deadline = time.monotonic() + 600
while any(alive.values()) and time.monotonic() < deadline:
    for user in [user for user in alive if alive[user]]:
        try:
            sessions[user].send_command("PING")
            sessions[user].read_response()
        except redis.ConnectionError:
            alive[user] = False
    new = state.with_suffix(".new")
    new.write_text(json.dumps({"time": time.time(), "alive": alive}))
    new.replace(state)
    time.sleep(0.2)
