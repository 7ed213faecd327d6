"""Ask instances for their state: print what each URL answers, as a JSON list; null where none runs.

python3 -c "$(cat ask.py)" CERTIFICATES URL...
"""

import json
import ssl
import sys
import urllib.error
import urllib.request

certificates, *urls = sys.argv[1:]
context = ssl.create_default_context(cafile=f"{certificates}/ca.crt")
context.load_cert_chain(f"{certificates}/tls.crt", f"{certificates}/tls.key")
opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({}))


def ask(url: str) -> object:
    try:
        with opener.open(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refusal:  # an instance that is not ready says why, with 503
        try:
            return json.load(refusal)
        except ValueError:
            return {}
    except (OSError, ValueError):
        return None


print(json.dumps([ask(url) for url in urls]))
