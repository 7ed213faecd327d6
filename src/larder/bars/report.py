"""What `larder inspect` shows to people."""

from typing import TYPE_CHECKING, Any

from larder.log import printable

if TYPE_CHECKING:
    from larder.bars.model import Inspection, Stored

SYMBOLS = 8
WIDTH = 14
COLUMNS = ("symbol", "event_timestamp", "open", "high", "low", "close", "adjusted_close", "volume")


def as_text(inspection: "Inspection") -> str:
    """Label and value a line; then the first bars as they would be stored."""
    one = inspection
    lines = [f"{'file':<{WIDTH}}{printable(one.file)}"]

    def line(label: str, value: object) -> None:
        if value not in (None, ""):
            lines.append(f"{label:<{WIDTH}}{printable(value)}")

    line("format", f"{one.format}: {one.why}" if one.format and one.why else one.format)
    line("encoding", one.encoding)
    line("compression", one.compression)
    line("delimiter", {"\t": "tab", " ": "blank"}.get(one.delimiter or "", one.delimiter))
    line("decimal", one.decimal)
    line("dates", one.dates)
    line("zone", one.zone)
    line("timeframe", one.timeframe)
    more = one.symbol_count - min(len(one.symbols), SYMBOLS)
    line("symbols", ", ".join(one.symbols[:SYMBOLS]) + (f" and {more:,} more" if more > 0 else ""))
    if one.first_day:
        line("days", f"{one.first_day} to {one.last_day}")
    line("weekdays", ", ".join(f"{day} {count:,}" for day, count in one.weekdays.items()))
    if one.bars or one.rejected or one.left_out:
        line(
            "bars",
            f"{one.bars:,} good, {one.rejected:,} rejected" + (f", {one.left_out:,} left out" * bool(one.left_out)),
        )
    if one.stored:
        line("stored", stored(one.stored))
    for reason, count in one.reasons.items():
        line("rejected", f"{count:,}  {reason}")
    for example in one.examples:
        line("for example", _rejected(example))
    for warning in one.warnings:
        line("warning", warning)
    if one.head:
        lines += ["", "The first bars, as they would be stored:", *_bars(one.head)]
    # The very text that load says.
    return "\n".join([*lines, "", printable(one.refusal) if one.refusal else "It would be loaded."])


def stored(one: "Stored") -> str:
    """How many bars are new, and which stored ones a load replaces."""
    told = f"{one.new:,} new, {one.equal:,} stored already"
    if not one.replaced:
        return told
    more = f" and {len(one.symbols) - SYMBOLS:,} more symbols" if len(one.symbols) > SYMBOLS else ""
    return (
        f"{told}, {one.replaced:,} stored with other values, which would be replaced: {one.first_replaced} to "
        f"{one.last_replaced} of {', '.join(one.symbols[:SYMBOLS])}{more}"
    )


def _rejected(example: dict[str, Any]) -> str:
    return "  ".join(str(value) for value in example.values() if value is not None)


def _bars(head: list[dict[str, Any]]) -> list[str]:
    rows = [["symbol", "date", *COLUMNS[2:]]]
    rows += [["null" if bar.get(name) is None else printable(bar[name]) for name in COLUMNS] for bar in head]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
