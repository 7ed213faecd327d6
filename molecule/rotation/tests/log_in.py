"""Read [[store, login, password], …] as JSON; print for each whether the store lets it in."""

import json
import sys
from pathlib import Path

import psycopg
import redis

HOST = sys.argv[1]
TLS = Path("/etc/larder/tls/feast/current")


def enters(store: str, login: str, password: str) -> bool:
    if store == "redis":
        client = redis.Redis(
            host=HOST,
            username=login,
            password=password,
            ssl=True,
            ssl_ca_certs=str(TLS / "ca.crt"),
            ssl_certfile=str(TLS / "tls.crt"),
            ssl_keyfile=str(TLS / "tls.key"),
        )
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False
    try:
        psycopg.connect(
            host=HOST,
            dbname="feast",
            user=login,
            password=password,
            sslmode="verify-full",
            sslrootcert=TLS / "ca.crt",
            sslcert=TLS / "tls.crt",
            sslkey=TLS / "tls.key",
        ).close()
    except psycopg.OperationalError as error:
        # Any other reason would be no refusal; a login that is gone is a member of no purpose, and has no entry.
        if "authentication failed" not in str(error) and "no pg_hba.conf entry" not in str(error):
            raise
        return False
    return True


print(json.dumps([enters(*asked) for asked in json.load(sys.stdin)]))
