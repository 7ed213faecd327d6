"""Where a secret may be: each place with its owner, its mode and the reason. Everywhere else it is a leak."""

from __future__ import annotations

import re
from typing import NamedTuple


class Allowed(NamedTuple):
    place: str  # as the report names it
    path: str  # as owner and mode a regular expression
    owner: str
    mode: str
    kinds: frozenset[str]
    reason: str

    def covers(self, place: str, path: str, owner: str, mode: str, kind: str) -> bool:
        return (
            place == self.place
            and kind in self.kinds
            and re.fullmatch(self.path, path) is not None
            and re.fullmatch(self.owner, owner) is not None
            and re.fullmatch(self.mode, mode) is not None
        )


def kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


ALLOWED = (
    Allowed(
        "host: files",
        r"/run/credentials/[^/]+/(feature_store\.yaml|(load|pipeline)_url)",
        "root:root",
        "0440",
        kinds("password"),
        "systemd decrypts a unit's credential here, in memory, for the user of this unit alone",
    ),
    Allowed(
        "host: files",
        r"/etc/larder/tls/(timescaledb|redis|feast|gateway)/[^/]+/tls\.key",
        "root:(postgres|redis|feast|haproxy)",
        "0640",
        kinds("key"),
        "a host's private key, made there, readable by root and the service",
    ),
    Allowed(
        "host: short-lived files",
        r"/tmp/\.ansible_tmp[^/]+",
        "",
        "0600",
        kinds("key"),
        "the same on its way, as community.crypto writes it, for root alone and for milliseconds",
    ),
    Allowed(
        "host: files",
        r"/etc/redis/users\.acl",
        "root:redis",
        "0640",
        kinds("hash"),
        "Redis knows its users by SHA-256",
    ),
    Allowed(
        "host: short-lived files",
        r"/root/\.ansible/tmp/ansible-moduletmp-[^/]+/new",
        "",
        "0600",
        kinds("hash"),
        "the same, on its way, in a directory of root alone",
    ),
    Allowed(
        "host: files",
        r"/etc/haproxy/tokens\.map",
        "root:haproxy",
        "0640",
        kinds("hash"),
        "the gateway knows its clients by SHA-256",
    ),
    Allowed(
        "host: short-lived files",
        r"/root/\.ansible/tmp/ansible-moduletmp-[^/]+/tokens\.map",
        "",
        "06[04]0",  # it has the mode of the former file before it takes that one's place
        kinds("hash"),
        "the same, on its way, in a directory of root alone",
    ),
    Allowed(
        "host: files",
        r"/var/lib/postgresql/17/main/(global|pg_wal)/.*",
        "postgres:postgres",
        "0600",
        kinds("verifier"),
        "PostgreSQL keeps SCRAM verifiers in pg_authid, and its log of changes",
    ),
    Allowed("pg_authid", "", "", "", kinds("verifier"), "where PostgreSQL keeps SCRAM verifiers"),
    Allowed("ACL LIST", "", "", "", kinds("hash"), "Redis shows administrators its users' SHA-256"),
    *(
        Allowed(
            f"HAProxy: {what}",
            "",
            "",
            "",
            kinds("hash"),
            "the SHA-256 of clients' tokens, shown to root alone",
        )
        for what in ("map /etc/haproxy/tokens.map", "table token_use")
    ),
    Allowed(
        "HAProxy: errors",
        "",
        "",
        "",
        kinds("token"),
        "the last request that was no HTTP, in memory alone: HAProxy cannot do without, and shows it to root alone",
    ),
    Allowed(
        "host: files",
        r"/var/lib/systemd/credential\.secret",
        "root:root",
        "0400",
        kinds("host"),
        "the key by which systemd encrypts this host's credentials",
    ),
    Allowed(
        "controller: files",
        r".*/inventory/\.vault_password",
        "root:root",
        "0600",
        kinds("vault"),
        "the vault's password, on the controller alone and never in git",
    ),
    Allowed(
        "controller: files",
        r".*/client/feature_store\.yaml",
        "root:root",
        "0600",
        kinds("password"),
        "what client_config.yml is asked to write",
    ),
)
