"""A stack of which all but the repository's host is lost is there again, with the same features for the same tokens."""

from __future__ import annotations

import json
import ssl
import time
import urllib.request
from pathlib import Path
from typing import Any

import playbooks
import pytest
import testinfra
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = ROOT / "tests/soak_restore"
ROWS = 10_000_000
MINUTES = 15
SYMBOLS = ["EURUSD", "GOOG.US", "NASDAQ", "SP500"]
FILL = f"""
INSERT INTO market_data.ohlcv_daily (symbol, event_timestamp, open, high, low, close, volume, adjusted_close)
SELECT 'S' || s, '2018-01-01'::timestamptz + d * interval '1 day', 10 + s, 12 + s, 9 + s, 11 + s, s * d, 11 + s
FROM generate_series(1, {ROWS // 2000}) AS s, generate_series(1, 2000) AS d
"""
COUNT = "SELECT count(*), sum(close)::bigint, max(event_timestamp) FROM market_data.ohlcv_daily"


@pytest.fixture(scope="module")
def inventory(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--ansible-inventory"))


def host(inventory: str, name: str) -> Host:
    return testinfra.get_host(f"ansible://{name}?sudo=true", ansible_inventory=inventory)


def play(inventory: str, groups: str, name: str, *arguments: str) -> str:
    inventories = [ROOT / "molecule/shared/inventory", SCENARIO / f"groups/{groups}.yml", inventory]
    result = playbooks.run(name, *arguments, inventories=inventories, one_stream=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


def sql(inventory: str, name: str, query: str) -> str:
    options = "--no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1"
    return host(inventory, name).check_output(
        f"cd / && runuser -u postgres -- psql {options} feast --command=%s", query
    )


def served(inventory: str, name: str) -> Any:
    """Every feature of the real symbols, as a client of the gateway reads them."""
    variables = host(inventory, name).ansible.get_variables()
    body = {"feature_service": "trading_signals", "entities": {"symbol": SYMBOLS}}
    request = urllib.request.Request(
        f"https://{variables['ansible_host']}:8443/get-online-features",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {variables['gateway_tokens']['reader']}", "Content-Type": "application/json"},
    )
    trusted = ssl.create_default_context(cafile=str(Path(inventory) / "ca.crt"))
    with urllib.request.urlopen(request, timeout=60, context=trusted) as answer:
        return json.load(answer)


def wait(inventory: str, unit: str) -> None:
    for _ in range(1200):
        state = host(inventory, "backup1").check_output(f"systemctl show --property=ActiveState,Result {unit}").split()
        if "ActiveState=inactive" in state:
            assert "Result=success" in state
            return
        assert "ActiveState=failed" not in state
        time.sleep(1)
    raise AssertionError(f"{unit} has not ended within twenty minutes")


def test_all_is_rebuilt_from_checkout_vault_and_repository(inventory: str) -> None:
    play(inventory, "before", "site.yml")
    play(inventory, "before", "ansible/trial/bars.yml")
    sql(inventory, "database1", FILL)
    wait(inventory, "larder-backup@full.service")
    wait(inventory, "larder-drill.service")
    began = time.monotonic()
    play(inventory, "before", "ansible/backup.yml", "--extra-vars={type: full, prove: true}")
    print(f"full backup and drill of {ROWS:,} rows: {time.monotonic() - began:.0f} s")
    assert "healthy" in host(inventory, "app1").check_output("larder status").splitlines()
    features, count = served(inventory, "app1"), sql(inventory, "database1", COUNT)
    assert int(count.split("|")[0]) > ROWS
    assert all(status == "PRESENT" for column in features["results"] for status in column["statuses"])
    for lost, units in (
        ("database1", "postgresql@17-main postgresql pgbackrest"),
        ("app1", "redis-server haproxy cron"),
    ):
        host(inventory, lost).check_output(f"systemctl disable --now {units}")

    began = time.monotonic()
    play(inventory, "after", "ansible/restore.yml", "--extra-vars=confirm=database2")
    seconds = time.monotonic() - began
    print(f"restore of {count} to new hosts, features served: {seconds:.0f} s")
    assert seconds < MINUTES * 60
    assert sql(inventory, "database2", COUNT) == count
    assert served(inventory, "app2") == features
    wait(inventory, "larder-backup@full.service")
    wait(inventory, "larder-drill.service")
    told = host(inventory, "app2").check_output("larder status")
    assert "healthy" in told.splitlines(), told
    assert "backup proven" in told


def test_the_online_store_is_filled_again_by_one_command_with_equal_values(inventory: str) -> None:
    before = served(inventory, "app2")
    cache = host(inventory, "app2")
    cache.check_output("systemctl stop redis-server && rm -rf /var/lib/redis/appendonlydir /var/lib/redis/dump.rdb")
    cache.check_output("systemctl start redis-server")
    assert served(inventory, "app2") != before
    cache.check_output("larder materialize --since 1970-01-01")
    assert served(inventory, "app2") == before


def test_the_database_is_restored_in_its_place_to_a_moment_and_what_was_there_is_kept(inventory: str) -> None:
    sql(inventory, "database2", "CREATE TABLE market_data.marks AS SELECT 'before' AS text")
    time.sleep(1.5)
    moment = sql(inventory, "database2", "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')")
    time.sleep(1.5)
    sql(inventory, "database2", "DROP TABLE market_data.marks; DELETE FROM features.technical_indicators_ma")
    features = served(inventory, "app2")
    told = play(inventory, "after", "ansible/restore.yml", f"--extra-vars={{at: '{moment}', confirm: database2}}")
    assert "/var/lib/postgresql/17/main.before-" in told
    assert sql(inventory, "database2", "SELECT text FROM market_data.marks") == "before"
    assert served(inventory, "app2") == features
    assert "healthy" in host(inventory, "app2").check_output("larder status").splitlines()
