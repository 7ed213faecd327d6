"""The secrets to look for, and every form in which one could be written down.

Nothing here is shared with the roles and their filters: what they encode is decoded by nobody but this.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography.hazmat.primitives.serialization import load_pem_private_key

ALPHABET = string.ascii_letters + string.digits
# What some sink quotes, escapes or expands stands in the middle, one by one; both ends survive any quoting.
AWKWARD = "'\"\\ $%,#:@/é€🔑&<"
# A token travels in a header: visible ASCII.
AWKWARD_TOKEN = "'\"\\$%,#:@/;&<"
# A piece of a secret is found wherever it starts: some window of this length is in any run of 17 characters.
WINDOW, STEP = 12, 6


def alphanumeric(length: int = 18) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def canary(awkward: str = AWKWARD) -> str:
    # No window of this text may be in this file.
    return alphanumeric() + "".join(char + alphanumeric(1) for char in awkward) + alphanumeric()


@dataclass(frozen=True)
class Secret:
    """Something to look for; ``kind`` says where it may be: password, token, hash, authority, key, vault, host."""

    name: str
    kind: str
    value: str | bytes


def windows(value: str | bytes) -> Iterator[str | bytes]:
    last = max(len(value) - WINDOW, 0)
    for start in {*range(0, last, STEP), last}:
        yield value[start : start + WINDOW]


def base64_forms(data: bytes) -> Iterator[bytes]:
    """Yield how Base64 writes the data when 0, 1 or 2 bytes stand before it, without what depends on its neighbours."""
    for before in range(3):
        text = base64.b64encode(b"\0" * before + data)
        first = -(-before * 8 // 6)
        last = (before + len(data)) * 8 // 6
        yield text[first:last]
        yield text[first:last].translate(bytes.maketrans(b"+/", b"-_"))


def escapes(text: str) -> Iterator[str]:
    yield text
    yield from (quote(text, safe=""), quote(text), quote_plus(text))
    yield "".join(f"%{byte:02X}" for byte in text.encode())
    yield from (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
    units = text.encode("utf-16-be").hex()
    as_json = [f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4)]
    as_yaml = [f"\\U{ord(char):08x}" for char in text]
    as_bytes = [f"\\x{byte:02x}" for byte in text.encode()]
    for escaped in (as_json, as_yaml, as_bytes):
        yield "".join(escaped)
        yield "".join(escape[:2] + escape[2:].upper() for escape in escaped)
    # Larder's own encoders leave letters and digits as they are.
    yield "".join(c if c.isascii() and c.isalnum() else "\\u" + "\\u".join(utf16(c)) for c in text)
    yield "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in text)


def utf16(char: str) -> list[str]:
    units = char.encode("utf-16-be").hex()
    return [units[start : start + 4] for start in range(0, len(units), 4)]


def forms(piece: str | bytes) -> set[bytes]:
    data = piece.encode() if isinstance(piece, str) else piece
    found = {data, data.hex().encode(), data.hex().upper().encode(), *base64_forms(data)}
    if isinstance(piece, str):
        found |= {form.encode() for form in escapes(piece)}
    # grep takes a pattern per line; the windows beside this one are found.
    return {form for form in found if b"\n" not in form and b"\0" not in form and len(form) >= WINDOW}


def patterns(wanted: Iterable[Secret]) -> dict[bytes, Secret]:
    """Return every pattern, and which secret it betrays."""
    found: dict[bytes, Secret] = {}
    for secret in wanted:
        for window in windows(secret.value):
            for form in forms(window):
                found.setdefault(form, secret)
    return found


def private_key(name: str, kind: str, pem: str) -> list[Secret]:
    """Return a key's private number, as bytes and as its PEM writes it; the rest of a PEM is public."""
    key: Any = load_pem_private_key(pem.encode(), None)
    number = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
    text = "".join(line for line in pem.splitlines() if not line.startswith("-"))
    at = base64.b64decode(text).index(number)
    lines = text[-(-at // 3) * 4 : (at + len(number)) // 3 * 4]
    return [Secret(name, kind, number), Secret(f"{name}, as PEM", kind, lines)]


class Vault:
    """A scenario's vault, as whoever has its password sees it."""

    def __init__(self, inventory: Path) -> None:
        self.inventory = inventory
        self.path = inventory / "group_vars/all/vault.yml"
        self.password = (inventory / ".vault_password").read_text().strip()
        self._vault = VaultLib([("default", VaultSecret(self.password.encode()))])

    def read(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load(self._vault.decrypt(self.path.read_bytes()))
        return loaded

    def write_text(self, text: str) -> None:
        self.path.write_bytes(self._vault.encrypt(text))

    def plant(self) -> None:
        """Give every password and token a canary for its value."""
        content = self.read()
        for group in ("timescaledb_passwords", "redis_passwords", "gateway_tokens"):
            awkward = AWKWARD_TOKEN if group == "gateway_tokens" else AWKWARD
            content[group] = {purpose: canary(awkward) for purpose in content[group]}
        self.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))

    def secrets(self, when: str) -> list[Secret]:
        """Return all that it holds, and the hashes by which hosts know some of it."""
        content = self.read()
        found = [Secret("the vault's password", "vault", self.password)]
        for purpose, password in content["timescaledb_passwords"].items():
            found.append(Secret(f"timescaledb_passwords.{purpose}, {when}", "password", password))
        for purpose, password in content["redis_passwords"].items():
            found.append(Secret(f"redis_passwords.{purpose}, {when}", "password", password))
            found.append(sha256(f"redis_passwords.{purpose}, {when}", password))
        for role, value in content["gateway_tokens"].items():
            for token in value if isinstance(value, list) else [value]:
                found.append(Secret(f"gateway_tokens.{role}, {when}", "token", token))
                found.append(sha256(f"gateway_tokens.{role}, {when}", token))
        for number, authority in enumerate(content["certificate_authorities"]):
            name = f"certificate_authorities[{number}], {when}"
            found += private_key(name, "authority", authority["private_key"])
        return found


def sha256(name: str, secret: str) -> Secret:
    return Secret(f"SHA-256 of {name}", "hash", hashlib.sha256(secret.encode()).hexdigest())


def verifier(role: str, text: str) -> list[Secret]:
    """Return the two keys of a SCRAM verifier; its salt alone is no secret."""
    keys = text.rpartition("$")[2].split(":")
    return [Secret(f"SCRAM verifier of {role}", "verifier", key) for key in keys]
