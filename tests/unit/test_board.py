"""The board's files: one source of questions for the page and for Grafana, and nothing from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import grafana
import pytest

ROOT = Path(__file__).resolve().parents[2]
BOARD = ROOT / "roles/monitoring/files/board"
PANELS: list[dict[str, Any]] = [
    panel for held in json.loads((BOARD / "board.json").read_text())["dashboards"] for panel in held["panels"]
]
OWN = sorted(path for path in BOARD.iterdir() if not path.name.startswith("uplot."))
# uplot 1.6.32 of npm: dist/uPlot.iife.min.js, dist/uPlot.min.css.
UPLOT = {
    "uplot.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


def test_grafanas_dashboards_are_those_of_the_board() -> None:
    written = {path: path.read_text() for path in sorted(grafana.DASHBOARDS.iterdir())}
    assert written == grafana.dashboards(), "run python tests/shared/grafana.py"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_one_that_the_page_and_grafana_can_show(panel: dict[str, Any]) -> None:
    units = re.findall(
        r"^  (\w+)(?:,|:)", (BOARD / "format.js").read_text().partition("const UNITS = {")[2], re.MULTILINE
    )
    assert {"title", "help", "kind", "unit", "queries"} <= {*panel}
    known = {"title", "help", "kind", "unit", "queries", "state", "warn", "bad", "needed", "absent", "lowest"}
    assert {*panel} <= known
    assert panel["kind"] in grafana.TYPES
    assert panel["unit"] in units
    assert panel["unit"] in grafana.UNITS
    assert panel["help"].endswith(".")
    assert panel["kind"] != "value" or len(panel["queries"]) == 1
    for query in [*panel["queries"], *([panel["state"]] if "state" in panel else [])]:
        assert {*query} == {"expr", "legend"}
        # Series of one name could not be told apart: the legend has all labels that the question keeps.
        alone = re.match(r"(?:max|min|sum)\(", query["expr"])
        kept = [] if alone else ",".join(re.findall(r"by \(([^)]*)\)", query["expr"])).split(",")
        labels = {label.strip() for label in kept} - {"le", ""}
        assert {*re.findall(r"\{\{(\w+)\}\}", query["legend"])} == labels
    limits = [panel[name] for name in ("warn", "bad") if name in panel]
    assert len({direction for limit in limits for direction in limit} - {"equal"}) <= 1


def test_no_two_panels_have_one_title() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len({*titles})


@pytest.mark.parametrize(
    ("limits", "value", "colour"),
    [
        ({"bad": {"above": 0}}, 0, "green"),
        ({"bad": {"above": 0}}, 1, "red"),
        ({"warn": {"above": 0.8}, "bad": {"above": 0.9}}, 0.8, "green"),
        ({"warn": {"above": 0.8}, "bad": {"above": 0.9}}, 0.85, "orange"),
        ({"warn": {"above": 0.8}, "bad": {"above": 0.9}}, 0.95, "red"),
        ({"bad": {"below": 1}}, 1, "green"),
        ({"bad": {"below": 1}}, 0.99, "red"),
        ({"warn": {"below": 30}, "bad": {"below": 7}}, 30, "green"),
        ({"warn": {"below": 30}, "bad": {"below": 7}}, 7, "orange"),
        ({"warn": {"below": 30}, "bad": {"below": 7}}, 6, "red"),
        ({}, 6, "text"),
    ],
)
def test_grafanas_colours_are_those_of_the_page(limits: dict[str, Any], value: float, colour: str) -> None:
    """Grafana takes the last step whose value is not above the one shown."""
    steps = grafana.steps(limits)
    assert [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1] == colour


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_the_page_needs_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"""(?:src|href|from|fetch\()\s*=?\s*["'](?:https?:)?//""", text) == []
    assert not re.search(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", text)
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


@pytest.mark.parametrize("path", sorted(BOARD.iterdir()), ids=lambda path: path.name)
def test_the_gateway_lets_every_file_of_the_page_through(path: Path) -> None:
    """A name of letters and dots is neither odd (board_odd) nor part of Prometheus' API."""
    configuration = (ROOT / "roles/gateway/templates/haproxy.cfg.j2").read_text()
    assert "board_file !board_odd get" in configuration
    assert re.fullmatch(r"[a-z]+(\.[a-z]+)+", path.name)


@pytest.mark.parametrize("name", UPLOT)
def test_uplot_is_the_published_one(name: str) -> None:
    assert hashlib.sha256((BOARD / name).read_bytes()).hexdigest() == UPLOT[name]
    assert "MIT License" in (BOARD / "uplot.license.txt").read_text()
