"""Encodings that carry any secret through Feast's configuration unchanged, and hashes to store instead of secrets.

Feast reads feature_store.yaml as ``yaml.safe_load(os.path.expandvars(text))``: a ``$`` expands whatever the quoting. It
then splits the Redis connection string on commas and gives each value to ``json.loads``. So only letters and digits
may appear literally.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import stringprep
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote

GENERATION_ROUNDS = 100_000


@cache
def _generation(password: str) -> str:
    slow = hashlib.pbkdf2_hmac("sha256", password.encode(), b"larder generation", GENERATION_ROUNDS, 4)
    return slow.hex()


def larder_login(purpose: str, passwords: Mapping[str, str]) -> str:
    """Return the login of a purpose's present password: ``serve`` is ``serve_g1f3a9c02``.

    The name follows from the password. So a new password makes a new login beside the old one, and an old vault names
    the old login again. The name tells less of a password than a verifier does: 32 bits of a slow hash.
    """
    return f"{purpose}_g{_generation(passwords[purpose])}"


def _escape(value: str, unit: str) -> str:
    """Escape all but ASCII letters and digits as ``\\u0024`` (JSON) or ``\\U00000024`` (YAML)."""
    out = []
    for char in value:
        if char.isascii() and char.isalnum():
            out.append(char)
        elif unit == "yaml":
            out.append(f"\\U{ord(char):08x}")
        else:
            # JSON knows only UTF-16 code units: an astral character is a surrogate pair.
            units = char.encode("utf-16-be")
            out.extend(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))
    return "".join(out)


def feast_redis_string(value: str) -> str:
    """Encode a value for Feast's Redis connection string, which stands in a single-quoted YAML scalar."""
    return f'"{_escape(value, "json")}"'


def feast_yaml_string(value: str) -> str:
    """Encode a value as a double-quoted YAML scalar in which ``expandvars`` finds nothing to expand."""
    return f'"{_escape(value, "yaml")}"'


def url_quote(value: str) -> str:
    """Percent-encode a value for any part of a URL; unlike Jinja's ``urlencode`` this covers ``/`` too."""
    return quote(value, safe="")


def pgpass_quote(value: str) -> str:
    """Encode a value as a field of libpq's password file."""
    return value.replace("\\", "\\\\").replace(":", "\\:")


_PROHIBITED = (
    stringprep.in_table_a1,
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def _saslprep(password: str) -> str:
    """Normalise as RFC 4013 does; like PostgreSQL and libpq, return a password that the profile forbids as it is."""
    if password.isascii():
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char for char in password if not stringprep.in_table_b1(char)
    )
    normal = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    if not normal or any(table(char) for char in normal for table in _PROHIBITED):
        return password
    if any(map(stringprep.in_table_d1, normal)):
        # Right-to-left text must begin and end so and hold no left-to-right letter (RFC 3454, section 6).
        ends = stringprep.in_table_d1(normal[0]) and stringprep.in_table_d1(normal[-1])
        if not ends or any(map(stringprep.in_table_d2, normal)):
            return password
    return normal


def scram_sha_256_verifier(password: str, salt: bytes | str, iterations: int = 4096) -> str:
    """Compute PostgreSQL's SCRAM-SHA-256 verifier (RFC 5803), so that the server never sees the password.

    ``salt`` is raw bytes, or text of which the first 16 bytes of its SHA-256 are taken. The
    password is normalised by SASLprep first, as a client that logs in does.
    """
    if isinstance(salt, str):
        salt = hashlib.sha256(salt.encode()).digest()[:16]
    salted = hashlib.pbkdf2_hmac("sha256", _saslprep(password).encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return f"SCRAM-SHA-256${iterations}:{text(salt)}${text(stored_key)}:{text(server_key)}"


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "feast_redis_string": feast_redis_string,
            "feast_yaml_string": feast_yaml_string,
            "larder_login": larder_login,
            "pgpass_quote": pgpass_quote,
            "url_quote": url_quote,
            "scram_sha_256_verifier": scram_sha_256_verifier,
        }
