"""`larder probe`: credentials prove themselves before they replace those in use.

Each logs in for real, does one thing that its purpose is for, and is refused one that its purpose is not for. They come
on standard input and are nowhere else: Feast's own loader reads them from a file in memory.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, LiteralString

import psycopg
from psycopg import sql

from larder.errors import ConfigError, LarderError
from larder.log import event, logger
from larder.operations import feast_store
from larder.postgres import session

KEY = "larder-probe"
WRITERS = ("push", "pipeline")
READABLE = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^(pg_|_|information_schema|timescaledb)'
  AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') LIMIT 1
"""
NEW_SCHEMA = "CREATE SCHEMA larder_probe"
NEW_TABLE = "CREATE TABLE feast_registry.larder_probe ()"


def probe(stdin: IO[str]) -> None:
    """Try credentials: a JSON list of {purpose, name, content}, the name being that of the credential's file."""
    try:
        credentials = [(c["purpose"], c["name"], c["content"]) for c in json.load(stdin)]
    except (ValueError, TypeError, KeyError):  # its text holds secrets
        raise ConfigError("Standard input is not what probe reads: a JSON list of {purpose, name, content}.") from None
    for purpose, name, content in credentials:
        if name == "feature_store.yaml":
            _feature_store(purpose, content)
        else:
            _postgresql(content, f"{purpose} at the database", registry=False)
        event("probed", purpose=purpose, credential=name)


@contextmanager
def _in_memory(content: str) -> Iterator[Path]:
    file = os.memfd_create("feature_store.yaml")
    try:
        with os.fdopen(os.dup(file), "w", encoding="utf-8") as writer:
            writer.write(content)
        yield Path(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def _feature_store(purpose: str, content: str) -> None:
    """The three clients of a feature_store.yaml, each configured by Feast."""
    with feast_store.quiet(), _in_memory(content) as path:
        from feast.infra.utils.postgres.connection_utils import _get_conn_kwargs, _get_conninfo
        from feast.repo_config import load_repo_config

        try:
            config = load_repo_config(Path("/"), path)
            registry = config.registry.path.replace("postgresql+psycopg://", "postgresql://", 1)
            offline_options = {k: v for k, v in _get_conn_kwargs(config.offline_store).items() if v is not None}
            offline = psycopg.conninfo.make_conninfo(_get_conninfo(config.offline_store), **offline_options)
            online = config.online_store
        except Exception as error:  # Feast's own message quotes the file
            raise ConfigError(f"Feast cannot use the configuration of {purpose}: {type(error).__name__}.") from None
        _postgresql(registry, f"{purpose} at the registry", registry=purpose == "pipeline")
        _postgresql(offline, f"{purpose} at the offline store", registry=False)
        if online is not None:
            _redis(online, purpose)


def _postgresql(conninfo: str, where: str, *, registry: bool) -> None:
    """Log in, read a table that may be read, and create neither a schema nor, but for the registry's owner, a table."""
    with session.connect(conninfo, where) as connection:
        rows = connection.execute(READABLE).fetchall()
        if rows:  # before the first deployment of the repository there is no table
            connection.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(*rows[0])))
        _allowed(connection, NEW_SCHEMA, where, expected=False)
        _allowed(connection, NEW_TABLE, where, expected=registry)


def _allowed(connection: psycopg.Connection, statement: LiteralString, where: str, *, expected: bool) -> None:
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(statement)
        allowed = True
    except psycopg.errors.InsufficientPrivilege:
        allowed = False
    if allowed != expected:
        raise LarderError(f"The login of {where} {'may' if allowed else 'may not'} do: {statement}.")


def _redis(config: Any, purpose: str) -> None:
    from feast.infra.online_stores.helpers import get_online_store_from_config
    from redis.exceptions import NoPermissionError, RedisError

    where = f"{purpose} at the online store"
    try:
        client = get_online_store_from_config(config)._get_client(config)
        client.hmget(KEY, ["x"])
        if purpose in WRITERS:
            client.hset(KEY, "x", "")
            client.expire(KEY, 1)
    except RedisError as error:
        logger.debug("redis", exc_info=logger.isEnabledFor(logging.DEBUG))
        what = (str(error).splitlines() or [""])[0]
        raise LarderError(f"Redis cannot be used by {where}: {type(error).__name__}: {what}") from None
    try:
        if purpose in WRITERS:
            forbidden = "CONFIG GET"
            client.config_get("maxmemory")
        else:
            forbidden = "HSET"
            client.hset(KEY, "x", "")
    except NoPermissionError:
        return
    raise LarderError(f"The user of {where} may do {forbidden}, which its purpose does not need.")
