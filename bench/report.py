#!/usr/bin/env python3
"""Write docs/benchmarks.md and its chart from what the benchmarks printed.

python bench/report.py .larder/benchmarks docs

The exit code is 1 where Larder beats the least that can be done: the figures beside it would say nothing.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pygal
from pygal.style import CleanStyle

TITLES = {
    "historical": "Point-in-time joins",
    "materialize": "Materialization",
    "history": "A history, from CSV files to features",
    "day": "One new day, from a CSV file to features",
    "serving": "Online reads",
    "deployment": "site.yml",
}
BENCHMARKS = (
    "historical",
    "historical-few-rows",
    "historical-5000-symbols",
    "historical-10000-symbols",
    "materialize",
    "materialize-5000-symbols",
    "materialize-10000-symbols",
    "compute",
    "serving",
    "deployment",
)
WAYS = {
    "larder": "Larder",
    "stock": "Feast",
    "stock_best": "Feast at its best",
    "feast": "feast serve",
    "feast_tuned": "feast serve at its best",
    "sql": "SQL by hand",
    "sql_copy": "SQL by hand, one statement, COPY",
    "floor": "the least that can be done",
    "floor_json": "the same, with the answer's JSON",
    "script": "a script that installs the packages",
    "unchanged": "Larder, once more",
}
STOCK = {"stock", "feast"}
FLOORS = {"floor", "floor_json"}
Row = tuple[str, float, float, float, dict[str, float]]  # way; median, least, most; what else there is to say, by unit


def cases(name: str, result: dict[str, Any]) -> list[tuple[str, str, list[Row]]]:
    """Return the cases of a benchmark: what was measured, the unit, and what each way took."""
    if name == "compute":
        day = result.pop("day")
        return [*cases("history", result), *cases("day", day)]
    if name != "serving":
        sizes = ", ".join(f"{value:,} {key}" for key, value in result.items() if isinstance(value, int))
        rows = [
            (
                way,
                took["median"],
                took["least"],
                took["most"],
                {"runs": took["runs"]} | ({"peak memory, MB": took["peak_mb"]} if "peak_mb" in took else {}),
            )
            for way, took in result["ways"].items()
            if "median" in took
        ]
        return [(f"{TITLES[name.partition('-')[0]]}: {sizes}", "s", rows)]
    return [
        (
            f"{TITLES[name]}: {case['symbols']} symbols x {case['features']} features, requests per second",
            "/s",
            [
                (
                    way,
                    *(took["requests_per_s"][which] for which in ("median", "min", "max")),
                    {"p50, ms": took["p50_ms"]["median"], "p99, ms": took["p99_ms"]["median"]},
                )
                for way, took in case.items()
                if isinstance(took, dict) and "requests_per_s" in took
            ],
        )
        for case in result["results"]
    ]


def number(figure: float) -> str:
    """Return three digits that count, or all before the point."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def table(title: str, unit: str, rows: list[Row]) -> str:
    """Return a table of the ways, the quickest first; how many times as quick Larder is stands beside each."""
    larder = next(median for way, median, *_ in rows if way == "larder")
    others = list(rows[0][-1])
    head = ["", "median", "least", "most", *others, "Larder is"]
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for way, median, least, most, more in sorted(rows, key=lambda row: row[1], reverse=unit == "/s"):
        times = larder / median if unit == "/s" else median / larder
        shown = (
            ""
            if way in {"larder", "unchanged"}
            else f"{times:.1f} times as quick"
            if times >= 1
            else f"{1 / times:.2f} times as slow"
        )
        figures = [f"{number(median)} {unit}", *map(number, (least, most, *(more[other] for other in others)))]
        lines.append(f"| {' | '.join([WAYS.get(way, way), *figures, shown])} |")
    return "\n".join(lines)


def beaten(title: str, unit: str, rows: list[Row]) -> list[str]:
    """Return a sentence for each floor whose quickest run Larder beats: in seconds, or in how much it serves."""
    ways = {way: figures for way, *figures, _ in rows}
    sentences = []
    for floor in sorted(FLOORS & ways.keys()):
        larder, best = ways["larder"][0], ways[floor][2 if unit == "/s" else 1]
        if (larder > best) if unit == "/s" else (larder < best):
            said = f"Larder ({number(larder)} {unit}) beats {WAYS[floor]} ({number(best)} {unit} at its best)"
            sentences.append(f"{title}: {said}, which is no floor: write a quicker one in bench/.")
    return sentences


def given_up(name: str, result: dict[str, Any]) -> list[str]:
    """Return a sentence for each way that had not ended when its time was over."""
    return [
        f"{WAYS[way]} was given up after {took['gave_up_after']:,.0f} s: "
        f"Larder is at least {took['of_larder_at_least']:.0f} times as quick. ({name})\n"
        for way, took in result.get("ways", {}).items()
        if took.get("gave_up_after") and "median" not in took
    ]


def beside(hostile: dict[str, Any]) -> list[str]:
    """Return a table of what other clients meet while one hostile reader sends the worst that it may."""
    lines = [
        "### One hostile reader on 64 connections: single reads of other clients",
        "",
        "| it sends | reads | failed | p50, ms | p99, ms | p99 beside that of before |",
        "|---|---|---|---|---|---|",
    ]
    for what, run in {"nothing": hostile["alone"], **hostile["kinds"], "nothing any more": hostile["after"]}.items():
        figures = [f"{run[name]:,}" for name in ("requests", "failed")] + [number(run[name]) for name in ("p50", "p99")]
        lines.append(f"| {' | '.join([what, *figures, number(run['p99'] / hostile['alone']['p99'])])} |")
    return [*lines, ""]


def sheet(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"### {title}", "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]


def through_gateway(result: dict[str, Any]) -> list[str]:
    """Return tables of reads through the gateway beside a bare instance's, and of where their CPU goes."""
    rows, cpu = [], []
    for case in result["results"]:
        size = [str(case[name]) for name in ("symbols", "connections", "kind")]
        ways = [case[way] for way in ("gateway", "bare_tls", "bare")]
        rates = [number(way["requests_per_s"]["median"]) for way in ways]
        times = [number(ways[0][name]["median"]) for name in ("p50_ms", "p99_ms")]
        shares = [f"{case[f'share_of_{bare}']:.0%}" for bare in ("bare_tls", "bare")]
        rows.append([*size, *rates, *times, *shares])
        parts = [ways[0].get(f"{part}_cpu_us", {"median": 0})["median"] for part in ("haproxy", "instances", "redis")]
        bare = [way["instances_cpu_us"]["median"] + way["redis_cpu_us"]["median"] for way in ways[1:]]
        cpu.append([*size, *map(number, [*parts, *bare, ways[0]["client_cpu_us"]["median"]])])
    size = ["symbols", "connections", ""]
    head = [*size, "gateway, /s", "bare TLS, /s", "bare, /s", "p50, ms", "p99, ms", "of bare TLS", "of bare"]
    parts = ["HAProxy", "instances", "Redis", "bare TLS, all", "bare, all", "wrk"]
    said = [
        "`bare` is one instance with as many workers, asked by plain HTTP; `bare TLS` the same by TLS. `of bare` is by",
        "the CPU of a request without wrk's: what is left of its rate on cores that have nothing else to do.",
        "",
    ]
    return [
        *sheet("Reads through the gateway, x 42 features", head, rows),
        *said,
        *sheet("The CPU of such a read, microseconds", [*size, *parts], cpu),
    ]


def freshness(pushes: dict[str, Any]) -> list[str]:
    """Return a table of pushes: how long until they are accepted, and until they are read."""
    head = ["rows", "pushes, /s", "accepted p50, ms", "p99", "then read p50, ms", "p99", "CPU of a row, us"]
    rows = []
    for case in pushes["results"]:
        times = [case[name][part] for name in ("accepted_ms", "readable_ms") for part in ("p50", "p99")]
        cpu = sum(max(0, took) for took in case["cpu_us_per_row"].values())
        rows.append([f"{case['rows']:,}", *map(number, [case["pushes_per_s"], *times, cpu])])
    return sheet("Pushes through the gateway", head, rows)


def landed(bars: dict[str, Any]) -> list[str]:
    """Return a table of the way of a new day from its file to the gateway, by stage."""
    stages = ["load", "compute", "materialize", "served", "check"]
    title = f"From the file of a new day to served features: {bars['symbols']:,} symbols, {bars['history_days']} days"
    return sheet(title, [f"{stage}, s" for stage in stages], [[number(bars["seconds"][stage]) for stage in stages]])


def unchanged(hosts: dict[str, Any]) -> list[str]:
    """Return a table of what each further host costs a run of site.yml that changes nothing."""
    further = {pair.rpartition(" ")[2]: seconds for pair, seconds in hosts["seconds_per_further_host"].items()}
    rows = [
        [count, *map(number, (min(took), max(took))), number(further[count]) if count in further else ""]
        for count, took in hosts["seconds"].items()
    ]
    return sheet("`site.yml` that changes nothing", ["hosts", "least, s", "most, s", "of it for a further host"], rows)


def label(title: str, unit: str) -> str:
    """Return what tells a case of the chart from the others."""
    if unit == "/s":
        return title.rpartition(", ")[0]
    first, *sizes = title.split(", ")
    return ", ".join([first, *(size for size in sizes if size.endswith("rows"))])


def chart(found: list[tuple[str, str, list[Row]]]) -> bytes:
    """Return bars of how many times as quick as Feast each way is, as SVG."""
    drawn = pygal.HorizontalBar(
        style=CleanStyle,
        logarithmic=True,
        range=(0.5, 100),
        zero=0.5,
        y_labels=[0.5, 1, 2, 5, 10, 20, 50, 100],
        title="Times as quick as Feast with its defaults",
        truncate_legend=-1,
        legend_at_bottom=True,
        js=(),
        height=560,
    )
    drawn.x_labels = [label(title, unit) for title, unit, _ in found]
    ways = ["stock", "stock_best", "larder", "floor"]
    alike = {"feast": "stock", "feast_tuned": "stock_best"}
    columns: dict[str, list[float | None]] = {way: [] for way in ways}
    for _, unit, rows in found:
        medians = {alike.get(way, way): median for way, median, *_ in rows}
        for way in ways:
            known = way in medians and "stock" in medians
            quicker = medians[way] / medians["stock"] if known and unit == "/s" else None
            columns[way].append(quicker or (medians["stock"] / medians[way] if known else None))
    for way, values in columns.items():
        drawn.add(WAYS[way], values)
    svg: bytes = drawn.render()
    return svg


TOLD = {"gateway": through_gateway, "hostile": beside, "pushes": freshness, "bars": landed, "hosts": unchanged}

# By curve: what it is called, of what, its unit, how much of what is measured makes one, and the sizes that are shown.
CURVES = {
    "memory": ("Redis", "symbols", "MB", 1e6),
    "materialize": ("materialize", "symbols", "s", 1),
    "day": ("load and compute a day", "symbols", "s", 1),
    "history": ("load and compute {} symbols", "years", "s", 1),
    "stored": ("PostgreSQL, {} symbols", "years", "MB", 1e6),
}
SIZES = {"symbols": (500, 2000, 5000, 10_000, 20_000, 50_000, 100_000), "years": (1, 2, 5, 10, 20, 30)}
BEGIN, END = "<!-- scaling: bench/report.py writes this table -->", "<!-- end of scaling -->"


def curves(result: dict[str, Any], docs: Path) -> None:
    """Write the tables of docs/scaling.md and its chart: what was measured, and by the formula the other sizes."""
    machine, lines = result["machine"], []
    named = {
        name: (curve[0].format(result["settings"]["history_symbols"]), *curve[1:]) for name, curve in CURVES.items()
    }
    drawn = pygal.XY(
        style=CleanStyle,
        logarithmic=True,
        title="Larder by the number of symbols: seconds, and MB in Redis",
        truncate_legend=-1,
        legend_at_bottom=True,
        js=(),
        height=480,
    )
    for of, sizes in SIZES.items():
        found = {name: curve for name, curve in named.items() if name in result["curves"] and curve[1] == of}
        if not found:  # some may have been measured alone
            continue
        rows = {}
        for name, (title, _, unit, one) in found.items():
            curve = result["curves"][name]
            measured = {size: value / one for size, value in curve["points"]}
            fixed, each = curve["fixed"] / one, curve["each"] / one
            shown = {size: measured.get(size, fixed + each * size) for size in sorted({*sizes, *measured})}
            rows[name] = shown
            lines.append(
                f"- {title}: {number(fixed)} {unit} + {number(each)} {unit} x {of}; "
                f"the formula misses no measured value by more than {curve['error']:.1%}."
            )
            if of == "symbols":
                drawn.add(f"{title}, {unit}", list(shown.items()))
        head = [of, *(f"{title}, {unit}" for title, _, unit, _ in found.values())]
        table = []
        for size in sorted({size for shown in rows.values() for size in shown}):
            cells = []
            for name, shown in rows.items():
                known = {point for point, _ in result["curves"][name]["points"]}
                value = shown.get(size)
                cells.append("" if value is None else number(value) if size in known else f"*{number(value)}*")
            table.append([f"{size:,}", *cells])
        lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *table)), ""]
    page = docs / "scaling.md"
    before, _, rest = page.read_text().partition(BEGIN)
    said = f"Measured on {result['date'][:10]}, {machine['cores']} cores of {machine['cpu']}; italics are computed."
    page.write_text("\n".join([f"{before}{BEGIN}", said, "", *lines, END]) + rest.partition(END)[2])
    (docs / "scaling.svg").write_bytes(drawn.render())


def main() -> None:
    results, docs = Path(sys.argv[1]), Path(sys.argv[2])
    # Some may have been measured alone.
    measured = {name: results / f"{name}.json" for name in BENCHMARKS}
    documents = {name: json.loads(path.read_text()) for name, path in measured.items() if path.exists()}
    found = [case for name, document in documents.items() for case in cases(name, document)]
    others = {name: json.loads(path.read_text()) for name in TOLD if (path := results / f"{name}.json").exists()}
    if (scale := results / "scale.json").exists():
        curves(json.loads(scale.read_text()), docs)
    machine = documents["serving"]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in documents["serving"]["versions"].items())
    (docs / "benchmarks.svg").write_bytes(chart([case for case in found if STOCK & {way for way, *_ in case[2]}]))
    text = [
        "# Benchmarks",
        "",
        f"`bench/report.py` wrote this on {datetime.now(UTC):%Y-%m-%d}, {machine['cores']} cores of {machine['cpu']}:",
        f"{versions}. Everything ran side by side on one machine, with equal answers, or there would be no figure.",
        "The machine says what the seconds are; the ratios are what to look at.",
        "",
        "![How many times as quick as Feast](benchmarks.svg)",
        "",
        *(part for case in found for part in (table(*case), "")),
        *(part for name, told in TOLD.items() if name in others for part in told(others[name])),
        *(sentence for name, document in documents.items() for sentence in given_up(name, document)),
        "What each way does, and what is left out, stands at the head of `bench/*.py`. Peak memory is that of the",
        "process that asks, not of PostgreSQL or Redis. All figures: `.larder/benchmarks/*.json`.",
        "",
    ]
    (docs / "benchmarks.md").write_text("\n".join(text))
    if sentences := [sentence for case in found for sentence in beaten(*case)]:
        sys.exit("\n".join(sentences))


if __name__ == "__main__":
    main()
