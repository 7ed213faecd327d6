"""A day of operations, through site.yml alone. The tests build on one another, in this order."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import playbooks
import pytest

ROOT = Path(__file__).resolve().parents[3]
GROWN = ROOT / "molecule/default/grown"
HOSTILE = [
    "double\"quote 'single' back\\slash",
    "$HOME ${PATH} %(x)s 100% %41",
    "comma,comma @ a=b # hash : colon",
    "ünïcödé パスワード 🔑🔑🔑🔑",
    "{{ not_a_template }} {% raw %}",
    "true true true true",
    "!tag &anchor *alias | > - `tick`",
    " leading and trailing, kept ",
    "?query=1&b=2/slash/..//;drop",
    "x" * 128,
    "1e5 12345 0x10 null NaN",
    "'; DROP ROLE feast_owner; --",
]
CLOSE = "ohlcv_features:close"


def sentence(run: Any) -> str:
    """Return the run's message, unwrapped."""
    return " ".join(run.output.split())


def test_second_run_changes_nothing_and_restarts_nothing(site: Any, starts: Any) -> None:
    before = starts()
    run = site()
    assert run.code == 0, run.output
    assert set(run.changed.values()) == {0}, run.output
    assert starts() == before


def test_check_and_diff_show_the_change_and_no_secret(site: Any, starts: Any, inventory: Any) -> None:
    before = starts()
    changes = {
        "redis_maxmemory": "100mb",
        "redis_passwords": {
            name: f"canary-{name}-0123456789" for name in ("serve", "push", "materialize", "monitor", "admin")
        },
        "gateway_tokens": {"reader": "canary-reader-0123456789", "writer": "canary-writer-0123456789"},
    }
    run = site("--check", "--diff", "-vv", variables=changes)
    assert run.code == 0, run.output
    assert "maxmemory" in run.output
    assert "canary" not in run.output
    variables = inventory.variables("server1")
    for secrets in ("redis_passwords", "timescaledb_passwords", "gateway_tokens"):
        assert not [name for name, secret in variables[secrets].items() if secret in run.output]
    assert starts() == before


def test_columns_of_a_former_release_are_widened_once_the_pipeline_has_the_code(
    site: Any, inventory: Any, watched: Any
) -> None:
    tables = ("features.ohlcv_features", "market_data.ohlcv_daily", "market_data.quotes")

    def ask(sql: str) -> list[str]:
        psql = "runuser -u postgres -- psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 feast"
        return inventory.host("database1").check_output(f"{psql} --command=%s", sql).splitlines()

    def types() -> list[str]:
        return ask(
            "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attname = 'volume' AND attnum > 0"
            f" AND attrelid::regclass::text IN {tables} ORDER BY attrelid::regclass::text"
        )

    volumes = "SELECT symbol, event_timestamp, volume::bigint FROM market_data.ohlcv_daily ORDER BY 1, 2"
    for table in tables:
        ask(f"ALTER TABLE {table} ALTER COLUMN volume TYPE bigint")
    before = ask(volumes)
    with watched() as client:
        layer = site("--tags", "timescaledb")
        assert layer.code == 0, layer.output
        assert "market_data.ohlcv_daily.volume" in sentence(layer)
        assert "not yet of the type that tables.yml declares" in sentence(layer)
        assert types() == ["bigint"] * 3
        shown, run = (site("--tags", "timescaledb,feast", *options) for options in (["--check", "--diff"], []))
    for output in (shown.output, run.output):
        for table in tables:
            assert f"(item={table}.volume: bigint to double precision)" in output
    assert shown.code == run.code == 0, run.output
    assert types() == ["double precision"] * 3
    assert ask(volumes) == before
    assert client.failures == []


def test_limit_and_tags_touch_one_host_and_one_layer(site: Any, starts: Any) -> None:
    before = starts()
    run = site("--limit", "cache1", "--tags", "redis", variables={"redis_maxmemory": "100mb"})
    assert run.code == 0, run.output
    assert {host: count > 0 for host, count in run.changed.items()} == {"cache1": True}
    assert "timescaledb :" not in run.output
    assert starts() == before  # a live change


def test_hostile_secrets_pass_every_sink_while_a_client_reads(
    site: Any, inventory: Any, client: Any, watched: Any
) -> None:
    variables = inventory.variables("server1")
    hostile: dict[str, dict[str, Any]] = {
        kind: {name: f"{kind} {name} {secret}" for name, secret in zip(variables[kind], HOSTILE, strict=False)}
        for kind in ("timescaledb_passwords", "redis_passwords")
    }
    unsafe: dict[str, dict[str, Any]] = {
        kind: {name: {"__ansible_unsafe": text} for name, text in secrets.items()} for kind, secrets in hostile.items()
    }
    # A token travels in a header: visible ASCII. The former one stays valid as the second.
    tokens = {"reader": "r$HOME%41,\"'#{{x}}\\=/+~", "writer": "w;drop|table&1e5:true!"}
    unsafe["gateway_tokens"] = {
        role: [{"__ansible_unsafe": token}, variables["gateway_tokens"][role]] for role, token in tokens.items()
    }
    expected = client.read([CLOSE], ["GOOG.US", "SP500"])
    newcomer = copy(client)
    newcomer.token = tokens["reader"]
    with watched() as watching:
        run = site(variables=unsafe)
        assert run.code == 0, run.output
        assert newcomer.read([CLOSE], ["GOOG.US", "SP500"]) == expected
        assert inventory.host("pipeline1").run("systemctl start feature-pipeline").rc == 0
        second = site(variables=unsafe)
        assert set(second.changed.values()) == {0}, second.output
        back = site()
        assert back.code == 0, back.output
    assert watching.failures == []
    for secret in [*hostile["timescaledb_passwords"].values(), *hostile["redis_passwords"].values(), *tokens.values()]:
        assert secret not in run.output + second.output + back.output


def test_host_of_somebody_else_is_named_in_check_mode_too(site: Any, starts: Any, inventory: Any) -> None:
    before = starts()
    server2 = inventory.host("server2")
    server2.check_output("mkdir /opt/feast && touch /opt/feast/photos")
    server2.check_output("systemd-run --unit=pooler python3 -m http.server 6566")
    server2.check_output('until [ -n "$(ss -Hltn sport = :6566)" ]; do sleep 0.1; done')
    try:
        run = site("--check", inventories=(GROWN,))
    finally:
        server2.check_output("systemctl stop pooler; rm -r /opt/feast")
    assert run.code != 0, run.output
    assert "server2: /opt/feast is somebody else" in sentence(run), run.output
    assert "server2: port 6566 (larder_feature_server_port) is taken by python3 of pooler.service" in sentence(run)
    assert set(run.changed.values()) == {0}, run.output
    assert starts() == before


def test_new_view_and_new_host_join_while_a_client_reads(site: Any, starts: Any, watched: Any, tmp_path: Path) -> None:
    repository = tmp_path / "feature_repo"
    shutil.copytree(ROOT / "feature_repo", repository, ignore=shutil.ignore_patterns("__pycache__"))
    (repository / "candle_shape.py").write_text(
        "from datetime import timedelta\n\n"
        "from entities import symbol\n"
        "from feast import FeatureView, Field\n"
        "from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource\n"
        "from feast.types import Float64\n\n"
        "candle_shape = FeatureView(\n"
        '    name="candle_shape",\n'
        "    entities=[symbol],\n"
        "    ttl=timedelta(days=730),\n"
        '    schema=[Field(name="body_size", dtype=Float64), Field(name="price_range", dtype=Float64)],\n'
        "    source=PostgreSQLSource(\n"
        '        name="candle_shape", table="features.price_action", timestamp_field="event_timestamp"\n'
        "    ),\n"
        ")\n"
    )
    before = starts()
    with watched() as client:
        run = site(variables={"feast_repository": str(repository)}, inventories=(GROWN,))
        assert run.code == 0, run.output
        # The servers trust their copy of the registry for a minute.
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                new = client.read(["candle_shape:body_size"], ["GOOG.US", "SP500"])
                break
            except OSError:
                time.sleep(2)
        else:
            pytest.fail("the new view is not served")
        assert new["body_size"] == client.read(["price_action:body_size"], ["GOOG.US", "SP500"])["body_size"]
    assert client.failures == []
    assert client.answers > 100
    assert starts() == before


def test_new_host_serves_alone_when_the_first_one_is_stopped(inventory: Any, client: Any) -> None:
    server1 = inventory.host("server1")
    expected = client.read([CLOSE], ["GOOG.US"])
    server1.check_output("systemctl stop feature-server@1 feature-server@2")
    try:
        assert client.read([CLOSE], ["GOOG.US"]) == expected
    finally:
        server1.check_output("systemctl start feature-server@1 feature-server@2")


@pytest.mark.parametrize(
    ("host", "unit", "layer"), [("cache1", "redis-server", "redis"), ("pipeline1", "cron", "pipeline")]
)
def test_failed_host_ends_the_run_before_plays_that_need_it(
    site: Any, starts: Any, inventory: Any, host: str, unit: str, layer: str
) -> None:
    before = starts()
    inventory.host(host).check_output(f"systemctl mask --runtime {unit}")
    try:
        run = site("--tags", f"{layer},feature_server", variables={"larder_log_level": "warning"})
    finally:
        inventory.host(host).check_output(f"systemctl unmask --runtime {unit}")
    assert run.code != 0, run.output
    assert f"fatal: [{host}]" in run.output
    assert "PLAY [Configure the feature servers" not in run.output
    assert starts() == before


def test_wrong_vault_password_ends_before_any_host_is_touched(site: Any, inventory: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "password"
    wrong.write_text("not the password\n")
    cache1 = inventory.host("cache1")

    def logins() -> int:
        return int(cache1.check_output("journalctl -u ssh -o cat --no-pager | grep -c Accepted"))

    own = -logins() + logins()  # each query is a login, too
    before = logins()
    run = site(env=playbooks.environment(ANSIBLE_VAULT_PASSWORD_FILE=str(wrong)))
    assert run.code != 0
    assert "Decryption failed" in run.output
    assert logins() - before == own


def test_bad_variables_end_the_run_with_a_sentence_each(site: Any) -> None:
    wrong = {
        "larder_gateway_port": (70000, ["larder_gateway_port", "70000", "65535"]),
        "redis_maxmemroy": ("1gb", ["redis_maxmemroy", "redis_maxmemory"]),
        "redis_maxmemory": ("soon", ["redis_maxmemory", "soon"]),
        "gateway_tokens": ({"reader": "short", "writer": "a-long-enough-token"}, ["gateway_tokens.reader"]),
    }
    run = site(variables={name: value for name, (value, _) in wrong.items()})
    assert run.code != 0
    assert not any(run.changed.values())
    for _, words in wrong.values():
        assert all(word in sentence(run) for word in words), run.output


def test_more_memory_than_the_host_has_is_refused_before_a_change(site: Any) -> None:
    run = site(variables={"redis_maxmemory": "900gb"})
    assert run.code != 0
    assert not any(run.changed.values())
    assert "redis_maxmemory" in sentence(run), run.output
    assert "900gb" in sentence(run), run.output


def test_lost_state_is_reported_first_and_restored_by_one_run(site: Any, inventory: Any, client: Any) -> None:
    database, pipeline, cache = (inventory.host(name) for name in ("database1", "pipeline1", "cache1"))
    count = "runuser -u postgres -- psql -XAt feast -c 'SELECT count(*) FROM market_data.ohlcv_daily'"
    bars = database.check_output(count)
    expected = client.read([CLOSE], ["GOOG.US", "SP500"])
    database.check_output("rm -rf /var/lib/postgresql/17/main")
    cache.check_output("rm -rf /var/lib/redis /etc/redis/users.acl /etc/credstore.encrypted/redis.maintenance")
    pipeline.check_output(
        "rm -rf /opt/feast/feature_repo /opt/feast/current/bin/python* /var/lib/larder/metrics"
        " /etc/credstore.encrypted/pipeline_url"
    )

    run = site()
    assert run.code != 0, run.output
    assert not any(run.changed.values()), run.output
    assert "database1: PostgreSQL's data directory /var/lib/postgresql/17/main does not exist" in sentence(run)
    assert "timescaledb_recreate_lost_cluster: true" in sentence(run)

    run = site(variables={"timescaledb_recreate_lost_cluster": True})
    assert run.code == 0, run.output
    assert database.check_output(count) == bars
    assert client.read([CLOSE], ["GOOG.US", "SP500"]) == expected
    assert pipeline.check_output("/usr/local/sbin/larder status").splitlines()[0] == "healthy"


def test_one_entry_adds_a_feature_and_restarts_nothing(
    site: Any, starts: Any, inventory: Any, watched: Any, tmp_path: Path
) -> None:
    """One entry in computed_views.yml, site.yml once; how long that takes is in the test's output."""
    repository = shutil.copytree(ROOT / "feature_repo", tmp_path / "repo", ignore=shutil.ignore_patterns("__pycache__"))
    entry = '      - {name: willr_14, formula: "talib.WILLR(high, low, close, 14)", description: Williams %R}\n'
    views = repository / "computed_views.yml"
    views.write_text(views.read_text().replace("      - {name: roc_10", entry + "      - {name: roc_10"))
    variables = {"feast_repository": str(repository), "timescaledb_tables_file": str(repository / "tables.yml")}
    pipeline = inventory.host("pipeline1")
    before = starts(), pipeline.check_output("readlink /opt/feast/current")

    shown = site("--check", "--diff", variables=variables)
    assert shown.code == 0, shown.output
    assert 'ADD COLUMN "willr_14" double precision' in sentence(shown)

    reader = "technical_indicators_momentum:willr_14"
    began = time.monotonic()
    with watched() as client:
        run = site(variables=variables)
        assert run.code == 0, run.output
        ran = time.monotonic()
        values: list[Any] = []
        while not values or None in values:
            assert time.monotonic() - ran < 180, values
            time.sleep(1)
            with suppress(urllib.error.HTTPError):  # the feature is not known before the registry is read again
                values = client.read([reader], ["GOOG.US", "EURUSD"])["willr_14"]
    print(f"site.yml {ran - began:.0f} s, served {time.monotonic() - ran:.0f} s after it")
    assert client.failures == []
    for symbol, value in zip(["GOOG.US", "EURUSD"], values, strict=True):
        with (ROOT / f".larder/trial/bars/{symbol}.csv").open(newline="") as file:
            bars = sorted(csv.DictReader(file), key=lambda bar: bar["Date"])[-14:]
        highest, lowest = max(float(bar["High"]) for bar in bars), min(float(bar["Low"]) for bar in bars)
        close = float(bars[-1]["Close"])
        assert value == pytest.approx(-100 * (highest - close) / (highest - lowest), rel=1e-9)
    assert (starts(), pipeline.check_output("readlink /opt/feast/current")) == before
    assert set(site(variables=variables).changed.values()) == {0}


@contextmanager
def meanwhile(inventory: Any, name: str, begin: str, end: str) -> Iterator[None]:
    """Let a shell of root on a host, which was there before, run one command, and the other one afterwards."""
    shell = shlex.join(["sudo", "sh", "-c", f"{begin} && echo begun; cat; {end}"])
    with subprocess.Popen(
        inventory.argv(name, shell), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout
        assert held.stdout.readline() == "begun\n"
        yield


def test_sudo_that_wants_a_terminal_is_named_and_nothing_has_changed(site: Any, inventory: Any) -> None:
    file, user = "/etc/sudoers.d/zz_tty", inventory.variables("cache1")["ansible_user"]
    with meanwhile(inventory, "cache1", f"echo 'Defaults:{user} requiretty' > {file}", f"rm {file}"):
        run = site(variables={"redis_maxmemory": "110mb"})
    assert run.code != 0
    assert f'cache1: sudo wants a terminal (requiretty), which Ansible has none of: write "Defaults:{user}' in sentence(
        run
    )
    assert "PLAY [Deploy" not in run.output


def test_unreachable_host_is_named_and_nothing_has_changed(site: Any, inventory: Any) -> None:
    # The firewall of the host itself: SSH does not answer to new connections.
    begin = (
        "nft add table inet outage && nft 'add chain inet outage in { type filter hook input priority -10; }'"
        " && nft add rule inet outage in tcp dport 22 ct state new drop"
    )
    with meanwhile(inventory, "cache1", begin, "nft delete table inet outage"):
        run = site("--ssh-extra-args=-o ControlPath=none -o ConnectTimeout=5", variables={"redis_maxmemory": "110mb"})
    assert run.code != 0
    assert "fatal: [cache1]: UNREACHABLE!" in run.output
    # Ansible's words: data could not be sent to the host, or a connection to it failed.
    assert re.search(r"cache1: (Data could not be sent to remote host|Failed to connect to the host)", sentence(run))
    assert "No host was changed." in sentence(run)
    assert "PLAY [Deploy" not in run.output
