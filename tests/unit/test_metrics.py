"""What an instance of several workers, or of one, says of its metrics."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

COUNT = """
import sys
from pathlib import Path
from larder.serving import metrics
shared = metrics.Shared(Path(sys.argv[2])) if sys.argv[2:] else None
metrics.ROWS.inc(int(sys.argv[1]))
metrics.aged("prices", [None, 10.0, 30.0])
metrics.REDIS.observe(0.001)
metrics.REDIS.observe(0.0011)
if shared:
    shared.write()
print(metrics.exposition(shared).decode())
"""


def told(count: str, *directory: Path) -> list[str]:
    """Return what a worker says that has read so many rows."""
    command = [sys.executable, "-c", COUNT, count, *map(str, directory)]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize(("several", "rows", "ages"), [(True, "12.0", 40.0), (False, "7.0", 20.0)])
def test_whichever_worker_is_asked_tells_of_all_of_them(tmp_path: Path, several: bool, rows: str, ages: float) -> None:
    shared = [tmp_path] if several else []
    told("5", *shared)
    lines = told("7", *shared)
    assert f"larder_rows_total {rows}" in lines
    assert f'larder_served_age_seconds_sum{{view="prices"}} {ages}' in lines


def test_a_bucket_holds_what_is_at_most_its_bound() -> None:
    lines = told("1")
    counts = {line.partition(" ")[0]: line.partition(" ")[2] for line in lines if line.startswith("larder_redis")}
    bounds = {bound: counts[f'larder_redis_seconds_bucket{{le="{bound}"}}'] for bound in ("0.0005", "0.001", "0.0025")}
    assert bounds == {"0.0005": "0.0", "0.001": "1.0", "0.0025": "2.0"}
    assert counts['larder_redis_seconds_bucket{le="+Inf"}'] == counts["larder_redis_seconds_count"] == "2.0"
    assert float(counts["larder_redis_seconds_sum"]) == pytest.approx(0.0021)


def test_what_a_worker_counts_is_in_its_file_within_half_a_second(tmp_path: Path) -> None:
    from larder.serving import metrics

    here, there = metrics.Shared(tmp_path), metrics.Shared(tmp_path)

    async def count() -> None:
        keep = asyncio.create_task(here.keep())
        metrics.ROWS.inc(3)
        await asyncio.sleep(0.5)
        keep.cancel()

    asyncio.run(count())
    assert here.own.exists()
    [family] = [
        family
        for family in text_string_to_metric_families(metrics.exposition(there).decode())
        if family.name == "larder_rows"
    ]
    # This process counts what it has itself, and what it reads as another's.
    assert [sample.value for sample in family.samples] == [2 * metrics.ROWS.numbers[0]]
    assert metrics.ROWS.numbers[0] >= 3
