"""Ask Redis as one user: a JSON request on standard input, a JSON list of answers on standard output.

An error is answered as its class and message, such as "NoPermissionError: ...".
"""

import json
import sys

import redis

request = json.load(sys.stdin)
client = redis.Redis(**request["connection"], socket_timeout=10, socket_connect_timeout=3, decode_responses=True)
try:
    pipe = client.pipeline(transaction=False)
    for command in request["commands"]:
        pipe.execute_command(*command)
    answers = pipe.execute(raise_on_error=False)
except redis.RedisError as error:
    answers = [error] * len(request["commands"])
json.dump([f"{type(a).__name__}: {a}" if isinstance(a, Exception) else a for a in answers], sys.stdout, default=list)
