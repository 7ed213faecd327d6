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


def reads(larder: float, floor: float, floor_json: float) -> dict[str, Any]:
    rates = {"larder": larder, "floor": floor, "floor_json": floor_json}
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
        ((2, 1), (100, 200, 150), []),
        ((0.95, 1), (205, 200, 195), []),  # within the floors' spread
        ((0.8, 1), (100, 200, 150), ["Point-in-time joins: 100 rows: Larder (0.8 s) beats the least"]),
        (
            (2, 1),
            (180, 200, 150),
            ["Online reads: 1 symbols x 42 features, requests per second: Larder (180 /s) beats the same"],
        ),
        ((2, 1), (250, 200, 150), ["Online reads: 1 symbols", "Online reads: 1 symbols"]),
    ],
)
def test_a_report_fails_where_larder_beats_a_floor(
    tmp_path: Path, seconds: tuple[float, float], rates: tuple[float, float, float], said: list[str]
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


def middle(**figures: float) -> dict[str, Any]:
    return {name: {"median": figure} for name, figure in figures.items()}


def test_a_report_tells_of_the_gateway_of_freshness_and_of_growth(tmp_path: Path) -> None:
    bare = middle(requests_per_s=5000, instances_cpu_us=200, redis_cpu_us=50, client_cpu_us=10)
    through = middle(requests_per_s=3000, p50_ms=2, p99_ms=4, haproxy_cpu_us=75, instances_cpu_us=225, redis_cpu_us=50)
    case = {"symbols": 1, "connections": 8, "kind": "kept", "bare": bare, "bare_tls": bare}
    case |= {"gateway": through | middle(client_cpu_us=20), "share_of_bare": 0.714, "share_of_bare_tls": 0.714}
    times = {"accepted_ms": {"p50": 1.5, "p99": 7}, "readable_ms": {"p50": 1, "p99": 3}}
    push = {"rows": 1, "pushes_per_s": 990, "cpu_us_per_row": {"push servers": 400, "postgresql": -2}, **times}
    stages = {"load": 2, "compute": 6, "materialize": 2, "served": 13, "check": 5}
    machine = {"cores": 2, "cpu": "a processor"}
    line = {"points": [[500, 1e6], [1000, 2e6]], "fixed": 0, "each": 2000, "error": 0.01}
    documents = {
        "serving": reads(100, 200, 150),
        "gateway": {"results": [case]},
        "pushes": {"results": [push]},
        "bars": {"symbols": 5000, "history_days": 300, "seconds": stages},
        "scale": {
            "date": "2026-11-30T00:00:00",
            "machine": machine,
            "settings": {"history_symbols": 50},
            "curves": {"memory": line},
        },
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    marked = "<!-- scaling: bench/report.py writes this table -->former<!-- end of scaling -->"
    (tmp_path / "scaling.md").write_text(f"before {marked} after")
    subprocess.run([sys.executable, ROOT / "bench/report.py", tmp_path, tmp_path], check=True)
    told = (tmp_path / "benchmarks.md").read_text()
    assert "| 1 | 8 | kept | 3,000 | 5,000 | 5,000 | 2 | 4 | 71% | 71% |" in told
    assert "| 1 | 990 | 1.5 | 7 | 1 | 3 | 400 |" in told
    assert "| 2 | 6 | 2 | 13 | 5 |" in told
    scaling = (tmp_path / "scaling.md").read_text()
    assert scaling.startswith("before <!-- scaling: bench/report.py writes this table -->")
    assert scaling.endswith("<!-- end of scaling --> after")
    assert "former" not in scaling
    assert "| 500 | 1 |" in scaling
    assert "| 100,000 | *200* |" in scaling
    assert (tmp_path / "scaling.svg").read_bytes().startswith(b"<?xml")


def test_a_further_host_is_told_beside_the_runs_that_it_took_part_in(tmp_path: Path) -> None:
    (tmp_path / "serving.json").write_text(json.dumps(reads(100, 200, 150)))
    further = {"1 to 4": 1.5, "4 to 8": 2.25}
    hosts = {"seconds": {"1": [20, 21], "4": [24.5, 26], "8": [33.5, 35]}, "seconds_per_further_host": further}
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    subprocess.run([sys.executable, ROOT / "bench/report.py", tmp_path, tmp_path], check=True)
    written = (tmp_path / "benchmarks.md").read_text()
    for row in ("| 1 | 20 | 21 |  |", "| 4 | 24.5 | 26 | 1.5 |", "| 8 | 33.5 | 35 | 2.25 |"):
        assert row in written
