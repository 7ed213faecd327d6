"""gunicorn's settings for an instance that anybody may read from, beside the deployed ones: for bench/gateway.py.

BARE_TLS=1 in its environment: by TLS, as the deployed ones but for the client's certificate, which wrk cannot show.
BARE_TLS=0: by plain HTTP.
"""

import os
import ssl

from larder.serving.gunicorn import *  # noqa: F403 # gunicorn reads the settings of one module
from larder.serving.gunicorn import Worker


class Plain(Worker):
    CONFIG_KWARGS = {n: v for n, v in Worker.CONFIG_KWARGS.items() if n != "ssl_context_factory"}  # noqa: RUF012 # as there


cert_reqs = ssl.CERT_NONE
if os.environ["BARE_TLS"] != "1":
    certfile = keyfile = ca_certs = None  # type: ignore[assignment] # gunicorn's word for no TLS
    worker_class = Plain  # type: ignore[assignment] # gunicorn takes a class, too
