"""How gunicorn runs one instance of the feature server (`gunicorn --config python:larder.gunicorn`).

What differs from instance to instance comes from its unit's environment; there is no secret in it.
"""

import os

# Without preload each worker builds its own store after the fork: two processes must not share one PostgreSQL socket.
wsgi_app = "larder.serve:create_app()"
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = False
workers = int(os.environ["LARDER_WORKERS"])
# The first instance listens on this port, the others follow.
bind = f"{os.environ['LARDER_ADDRESS']}:{int(os.environ['LARDER_PORT']) + int(os.environ['LARDER_INSTANCE']) - 1}"

loglevel = os.environ.get("LARDER_LOG_LEVEL", "info")
accesslog = "-" if loglevel == "debug" else None

# A recycled worker resets connections.
max_requests = 0
control_socket_disable = True
# Longer than HAProxy keeps an idle connection, so that HAProxy is the one that closes it.
keepalive = 75
graceful_timeout = 20
worker_tmp_dir = os.environ["RUNTIME_DIRECTORY"]

# gunicorn would tell systemd that it is ready before its workers are: larder.serve tells it.
os.environ["LARDER_NOTIFY_SOCKET"] = os.environ.pop("NOTIFY_SOCKET", "")
