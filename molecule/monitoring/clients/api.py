"""Ask Prometheus or Alertmanager on the monitoring host, with its certificate: api.py URL."""

import json
import ssl
import sys
import urllib.request

TLS = "/etc/larder/tls/monitoring/current"
context = ssl.create_default_context(cafile=f"{TLS}/ca.crt")
context.load_cert_chain(f"{TLS}/tls.crt", f"{TLS}/tls.key")
with urllib.request.urlopen(sys.argv[1], timeout=20, context=context) as answer:
    json.dump(json.load(answer), sys.stdout)
