"""Grafana's dashboards, made of the board's panels. `python tests/shared/grafana.py` writes them anew to grafana/."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BOARD = ROOT / "roles/monitoring/files/board/board.json"
DASHBOARDS = ROOT / "grafana/dashboards"

# Grafana's name of each unit of the board.
UNITS = {
    "seconds": "s",
    "ratio": "percentunit",
    "bytes": "bytes",
    "count": "short",
    "rate": "ops",
    "state": "none",
    "yes": "none",
    "date": "dateTimeAsIso",
}
TYPES = {"value": "stat", "list": "bargauge", "graph": "timeseries"}
# Values that are words, each with its colour if the limits do not give it.
WORDS = {
    "state": {0: ("ok", "green"), 1: ("warning", "orange"), 2: ("failed", "red"), 3: ("unknown", "text")},
    "yes": {0: ("no", ""), 1: ("yes", "")},
}
WIDTH, ACROSS, HEIGHT = 24, 3, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Panel = Mapping[str, Any]


def steps(panel: Panel) -> list[dict[str, Any]]:
    """Return the colours from each value on. Grafana's begin at the value, the board's `above` behind it."""
    limits = [(panel[name], colour) for name, colour in (("warn", "orange"), ("bad", "red")) if name in panel]
    above = [(limit["above"], colour) for limit, colour in limits if "above" in limit]
    below = [(limit["below"], colour) for limit, colour in limits if "below" in limit]
    if below:
        ends = sorted(below)
        colours = [colour for _, colour in ends] + ["green"]
        return [
            {"value": None, "color": colours[0]},
            *({"value": end, "color": colour} for (end, _), colour in zip(ends, colours[1:], strict=True)),
        ]
    return [
        {"value": None, "color": "green" if limits else "text"},
        *({"value": math.nextafter(limit, math.inf), "color": colour} for limit, colour in sorted(above)),
    ]


def expressions(panel: Panel) -> Iterator[tuple[str, str]]:
    """Return each question and the name of its series; Grafana's dates are milliseconds."""
    for query in panel["queries"]:
        yield f"({query['expr']}) * 1000" if panel["unit"] == "date" else query["expr"], query["legend"]


def made(panel: Panel, number: int) -> dict[str, Any]:
    graph = panel["kind"] == "graph"
    words = WORDS.get(panel["unit"], {})
    mappings = {
        str(value): {"text": text, **({"color": colour} if colour else {})} for value, (text, colour) in words.items()
    }
    reduced = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    options = {
        "stat": {**reduced, "colorMode": "value", "graphMode": "none", "textMode": "value"},
        "bargauge": {**reduced, "orientation": "horizontal", "displayMode": "basic", "valueMode": "color"},
        "timeseries": {
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }
    return {
        "id": number + 1,
        "type": TYPES[panel["kind"]],
        "title": panel["title"],
        "description": panel["help"],
        "datasource": DATASOURCE,
        "gridPos": {
            "x": number % ACROSS * (WIDTH // ACROSS),
            "y": number // ACROSS * HEIGHT,
            "w": WIDTH // ACROSS,
            "h": HEIGHT,
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": expr,
                "legendFormat": legend,
                "instant": not graph,
                "range": graph,
            }
            for index, (expr, legend) in enumerate(expressions(panel))
        ],
        "fieldConfig": {
            "defaults": {
                "unit": UNITS[panel["unit"]],
                "noValue": "no data",
                "color": {"mode": "palette-classic" if graph else "thresholds"},
                "thresholds": {"mode": "absolute", "steps": steps(panel)},
                "mappings": [{"type": "value", "options": mappings}] if mappings else [],
                **({"min": 0, "max": 1} if panel["unit"] == "ratio" and not graph else {}),
            },
            "overrides": [],
        },
        "options": options[TYPES[panel["kind"]]],
    }


def dashboard(held: Mapping[str, Any]) -> dict[str, Any]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": f"larder-{held['name']}",
        "title": f"Larder: {held['title'][0].lower()}{held['title'][1:]}",
        "tags": ["larder"],
        "schemaVersion": 39,
        "editable": True,
        "timezone": "utc",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source]},
        "links": [{"title": "Larder", "type": "dashboards", "tags": ["larder"], "asDropdown": False, "keepTime": True}],
        "panels": [made(panel, number) for number, panel in enumerate(held["panels"])],
    }


def dashboards() -> dict[Path, str]:
    """Return each dashboard's file and its content."""
    board = json.loads(BOARD.read_text())
    return {
        DASHBOARDS / f"larder-{held['name']}.json": json.dumps(dashboard(held), indent=2, ensure_ascii=False) + "\n"
        for held in board["dashboards"]
    }


if __name__ == "__main__":
    DASHBOARDS.mkdir(parents=True, exist_ok=True)
    for path, content in dashboards().items():
        path.write_text(content)
