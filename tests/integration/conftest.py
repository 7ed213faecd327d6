"""A database of its own for each test, in the server whose superuser's URL is in LARDER_TEST_POSTGRES; and a Redis."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
import pytest
import redis
import yaml
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from larder.features import definitions
from larder.operations.credentials import Credentials
from larder.quality import rules

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
REPO = Path(__file__).parents[2] / "feature_repo"
DECLARED = yaml.safe_load((REPO / "tables.yml").read_text())
SCHEMAS = [*DECLARED["schemas"], definitions.SCHEMA, rules.SCHEMA]
TABLES = [*DECLARED["tables"], *definitions.read(REPO).tables(), *rules.read(REPO).tables()]


@pytest.fixture(autouse=True)
def _repository_as_new():
    """Import the feature repository anew in each test: Feast notes what was materialized in its view objects, too."""
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(REPO):
            del sys.modules[name]


@pytest.fixture
def url():
    name = f"larder_test_{os.getpid()}"
    with psycopg.connect(ADMIN, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE IF EXISTS {name}")
        admin.execute(f"CREATE DATABASE {name}")
        url = make_conninfo(ADMIN, dbname=name)
        with psycopg.connect(url, autocommit=True) as connection:
            for schema in SCHEMAS:
                connection.execute(f"CREATE SCHEMA {schema}")
            for table in TABLES:
                columns = [
                    f"{c['name']} {c['type']}"
                    + ("" if c.get("nullable", True) else " NOT NULL")
                    + (f" DEFAULT {c['default']}" if "default" in c else "")
                    for c in table["columns"]
                ]
                keys = ", ".join(table["primary_key"]) if "primary_key" in table else None
                columns += [f"PRIMARY KEY ({keys})"] if keys else []
                connection.execute(f"CREATE TABLE {table['name']} ({', '.join(columns)})")
                for index in table.get("indexes", ()):
                    connection.execute(f"CREATE INDEX ON {table['name']} ({', '.join(index['columns'])})")
        yield url
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def credentials(url, tmp_path):
    """Those of the pipeline: every URL is the superuser's; the registry is in the same database."""
    directory = tmp_path / "credentials"
    directory.mkdir()
    for name in ("load_url", "pipeline_url"):
        (directory / name).write_text(url + "\n")
    options = conninfo_to_dict(url)
    registry = f"postgresql+psycopg:///{options.pop('dbname')}?{urlencode(options, quote_via=quote)}"
    (directory / "feature_store.yaml").write_text(
        yaml.safe_dump({"project": "test", "registry": {"registry_type": "sql", "path": registry}})
    )
    return Credentials(directory)


@pytest.fixture(scope="module")
def redis_address(tmp_path_factory):
    """LARDER_TEST_REDIS, or a server of this module's own: Debian's redis-tools has it under another name."""
    if address := os.environ.get("LARDER_TEST_REDIS"):
        yield address
        return
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    if not binary:
        pytest.skip("no redis-server here, and LARDER_TEST_REDIS names none")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = tmp_path_factory.mktemp("redis")
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(directory)]
    with subprocess.Popen(["redis-server", *options], executable=binary, stdout=subprocess.DEVNULL) as process:
        client = redis.Redis(port=port)
        for _ in range(100):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        process.terminate()
