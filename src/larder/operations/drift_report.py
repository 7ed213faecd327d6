"""The report of drift as one HTML file: small multiples of the features that moved, without anything from elsewhere."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from html import escape

import numpy as np
import psycopg
from psycopg import sql

from larder.operations.drift import Judged, differs, merged
from larder.quality.rules import Drift

BARS = "SELECT view, feature, symbols, edges, counts, since::date, until::date FROM quality.references"
PAST = """
SELECT view, feature, symbols, day, psi, psi_expected FROM quality.drift WHERE psi IS NOT NULL
AND day > (SELECT max(day) FROM quality.drift) - 90 ORDER BY day
"""
WIDTH, HEIGHT = 260, 90
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; max-width: 1200px; color: #222; background: #fff }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.5em }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere } small { color: #666 }
svg { width: 100%; height: auto; background: #f7f7f7 }
.reference { fill: #b8c4d0 } .now { fill: #c8553d; opacity: .65 }
.line { fill: none; stroke: #c8553d; stroke-width: 1.5 }
.limit { stroke: #555; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } svg { background: #242424 } small { color: #999 }
}
"""
Key = tuple[str, str, str]
Points = Sequence[tuple[date, float, float]]


def html(connection: psycopg.Connection, drift: Drift, judged: Sequence[Judged]) -> str:
    """The features that moved, then those that are beyond a threshold, then all others."""
    references = {tuple(row[:3]): row[3:] for row in connection.execute(sql.SQL(BARS))}
    past: dict[Key, list[tuple[date, float, float]]] = {}
    for view, feature, symbols, *point in connection.execute(sql.SQL(PAST)):
        past.setdefault((view, feature, symbols), []).append((point[0], point[1], point[2]))
    parts = {
        "Features that moved": [one for one in judged if one.moved],
        "Beyond a threshold, not yet for long enough, or no longer": [
            one for one in judged if not one.moved and one.days_beyond
        ],
        "Others": [one for one in judged if not one.moved and not one.days_beyond],
    }
    body = []
    for title, those in parts.items():
        if not those:
            continue
        body.append(f"<h2>{title}: {len(those)}</h2><section>")
        for one in sorted(those, key=lambda one: -(one.psi or 0)):
            key = (one.view, one.feature, one.symbols)
            body.append(_figure(one, references.get(key), past.get(key, []), drift))
        body.append("</section>")
    newest = max((one.day for one in judged), default=None)
    now = datetime.now(UTC)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Larder: drift of the features</title><style>{STYLE}</style></head><body>
<h1>Drift of the features</h1>
<p>The values of the {drift.window_days} days up to {newest or "now"} (red) beside those of the reference (grey), in
bins of about equal counts of the reference; below, PSI by day with its threshold. Made at {now:%Y-%m-%d %H:%M} UTC.</p>
{"".join(body) or "<p>Nothing was judged yet: there are too few days, or too few symbols.</p>"}
</body></html>
"""


def _figure(one: Judged, reference: Sequence[object] | None, past: Points, drift: Drift) -> str:
    span = f"<br><small>reference {reference[2]} to {reference[3]}</small>" if reference else ""
    bars = _bars(reference[1], one.counts, drift.bins) if reference else ""  # type: ignore[arg-type]
    return (
        f"<figure>{bars}{_line(past, drift.psi)}<figcaption><b>{escape(one.name)}</b><br>{escape(differs(one))}"
        f"{span}</figcaption></figure>"
    )


def _bars(reference: Sequence[int], now: Sequence[int], bins: int) -> str:
    of_reference, of_now = np.asarray(reference, dtype=np.float64), np.asarray(now, dtype=np.float64)
    if len(of_reference) != len(of_now) or not of_reference.sum() or not of_now.sum():
        return ""
    which = merged(of_reference, bins)
    count = int(which.max()) + 1
    shares = [np.bincount(which, values, count) / values.sum() for values in (of_reference, of_now)]
    top = max(float(values.max()) for values in shares)
    wide = WIDTH / count
    rectangles = [
        f'<rect class="{name}" x="{n * wide + wide * left:.1f}" y="{HEIGHT * (1 - share / top):.1f}" '
        f'width="{wide * 0.5:.1f}" height="{HEIGHT * share / top:.1f}"><title>{share:.1%}</title></rect>'
        for name, left, values in (("reference", 0.05, shares[0]), ("now", 0.4, shares[1]))
        for n, share in enumerate(values)
    ]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="distribution">{"".join(rectangles)}</svg>'


def _line(past: Points, threshold: float) -> str:
    if len(past) < 2:
        return ""
    height = HEIGHT / 2
    limits = [threshold + expected for *_, expected in past]
    top = max([*limits, *(value for _, value, _ in past)])
    first, last = past[0][0], past[-1][0]
    days = max((last - first).days, 1)

    def points(values: Mapping[date, float]) -> str:
        return " ".join(
            f"{WIDTH * (day - first).days / days:.1f},{height * (1 - value / top):.1f}" for day, value in values.items()
        )

    series = points({day: value for day, value, _ in past})
    limit = points(dict(zip((day for day, *_ in past), limits, strict=True)))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="PSI by day">'
        f'<polyline class="limit" fill="none" points="{limit}"/><polyline class="line" points="{series}"/></svg>'
    )
