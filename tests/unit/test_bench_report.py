"""bench/report.py: a floor that Larder beats is no floor."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def join(larder: float, floor: float) -> dict[str, Any]:
    took = {"larder": larder, "floor": floor}
    ways = {
        way: {"median": median, "least": median * 0.9, "most": median * 1.1, "runs": 5} for way, median in took.items()
    }
    return {"rows": 100, "ways": ways}


def reads(larder: float, floor: float) -> dict[str, Any]:
    rates = {"larder": larder, "floor": floor}
    ways = {
        way: {
            "requests_per_s": {"median": rate, "min": rate * 0.9, "max": rate * 1.1},
            "p50_ms": {"median": 1},
            "p99_ms": {"median": 2},
        }
        for way, rate in rates.items()
    }
    case = {"symbols": 1, "features": 42, **ways}
    return {"machine": {"cores": 2, "cpu": "a processor"}, "versions": {"feast": "1"}, "results": [case]}


@pytest.mark.parametrize(
    ("seconds", "rates", "said"),
    [
        ((2, 1), (100, 200), []),
        ((0.95, 1), (205, 200), []),  # within the floor's spread
        ((0.8, 1), (100, 200), ["Point-in-time joins: 100 rows: Larder (0.8 s) beats"]),
        ((2, 1), (250, 200), ["Online reads: 1 symbols x 42 features, requests per second: Larder (250 /s) beats"]),
    ],
)
def test_a_report_fails_where_larder_beats_the_floor(
    tmp_path: Path, seconds: tuple[float, float], rates: tuple[float, float], said: list[str]
) -> None:
    for name, result in (("historical", join(*seconds)), ("serving", reads(*rates))):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    report = [sys.executable, ROOT / "bench/report.py", tmp_path, tmp_path]
    ended = subprocess.run(report, capture_output=True, text=True, check=False)
    assert ended.returncode == bool(said), ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
    assert "the least that can be done" in (tmp_path / "benchmarks.md").read_text()
