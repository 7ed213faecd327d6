"""Ask without a certificate, or with one: knock.py URL [DIRECTORY]. Prints the status, or why there is none."""

import ssl
import sys
import urllib.error
import urllib.request

context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
if len(sys.argv) > 2:
    context.load_cert_chain(f"{sys.argv[2]}/tls.crt", f"{sys.argv[2]}/tls.key")
try:
    with urllib.request.urlopen(sys.argv[1], timeout=5, context=context) as answer:
        print(answer.status)
except urllib.error.HTTPError as error:
    print(error.code)
except TimeoutError:
    print("no answer")
except OSError as error:
    print("no answer" if "timed out" in str(error) else f"refused: {error}")
