"""Bars judged by the bars before them: all symbols at once, in NumPy; only what is suspicious bar by bar."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt

from larder.quality.rules import Rule, Rules

PRICES = ("open", "high", "low", "close")
# A change near the ratio of a split counts only beyond so many deviations: it is no wild share's usual day.
SPLIT_DEVIATIONS = 5
DAY = 86_400_000_000
EPOCH = date(2000, 1, 1)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass
class Series:
    """Bars by symbol and time. Those that are not judged are stored already, and good."""

    symbols: Sequence[str]
    symbol: Ints  # which of the symbols
    time: Ints  # microseconds since 2000
    columns: Mapping[str, Floats]
    judged: Mask

    def __post_init__(self) -> None:
        """Note where the bars of each symbol begin and end."""
        count = len(self.symbol)
        begins = np.flatnonzero(np.diff(self.symbol, prepend=-1))
        lengths = np.diff(begins, append=count)
        self.begin = np.repeat(begins, lengths)
        self.end = np.repeat(begins + lengths, lengths)

    def day(self, row: int) -> date:
        return EPOCH + timedelta(days=int(self.time[row] // DAY))


@dataclass(frozen=True)
class Finding:
    """What a rule says of a bar."""

    row: int
    rule: str
    of: str
    severity: str
    message: str


def judge(rules: Rules, series: Series) -> list[Finding]:
    """What the rules of bars find, in no particular order."""
    found: list[Finding] = []
    if not len(series.symbol):
        return found
    for rule in rules.bars:
        if rule.rule == "range":
            found += _range(rule, series)
        elif rule.rule == "spike":
            found += _spike(rule, rules, series)
        elif rule.rule == "repeat":
            found += _repeat(rule, series)
    found += _levels(rules, series)
    return found


def _range(rule: Rule, series: Series) -> Iterator[Finding]:
    values = series.columns[rule.of]
    least, most = rule.given.get("least", -np.inf), rule.given.get("most", np.inf)
    with np.errstate(invalid="ignore"):
        wrong = series.judged & ((values < least) | (values > most))
    allowed = f"it may be {least:g} to {most:g}"
    for row in np.flatnonzero(wrong):
        yield Finding(int(row), "range", rule.of, rule.severity, f"{rule.of} is {values[row]:g}; {allowed}")


def _sums(values: Floats, lowest: Ints, row: Ints) -> Floats:
    """Sums of the values from one row up to, and without, another."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray(total[row] - total[lowest])


def _spike(rule: Rule, rules: Rules, series: Series) -> Iterator[Finding]:
    values = series.columns[rule.of]
    known = np.isfinite(values)
    row = np.arange(len(values))
    lowest = np.maximum(series.begin, row - rules.bars_before)
    count = _sums(known.astype(np.float64), lowest, row)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = _sums(np.where(known, values, 0.0), lowest, row) / count
        wrong = series.judged & (count >= rules.fewest_bars) & (mean > 0) & (values > rule["times"] * mean)
    for i in np.flatnonzero(wrong):
        said = (
            f"{rule.of} is {values[i] / mean[i]:,.0f} times the mean of the {int(count[i])} bars before, {mean[i]:,.6g}"
        )
        yield Finding(int(i), "spike", rule.of, rule.severity, said)


def repeats(series: Series) -> Ints:
    """How many bars in a row, up to each one, have the same open, high, low, close."""
    row = np.arange(len(series.symbol))
    same = row > series.begin
    for name in PRICES:
        values = series.columns[name]
        same[1:] &= values[1:] == values[:-1]
    return np.asarray(row - np.maximum.accumulate(np.where(same, 0, row)) + 1)


def _repeat(rule: Rule, series: Series) -> Iterator[Finding]:
    length = repeats(series)
    wrong = series.judged & (length >= rule["bars"])
    if rule.severity == "warn":  # once, of the last bar of them
        ends = np.append(length[1:] <= length[:-1], True)
        wrong &= ends
    for i in np.flatnonzero(wrong):
        said = f"open, high, low and close are the same in {length[i]} bars, from {series.day(i - length[i] + 1)} on"
        yield Finding(int(i), "repeat", "", rule.severity, said)


def _levels(rules: Rules, series: Series) -> Iterator[Finding]:
    """Changes of the price that are no usual day's: splits and jumps.

    A bar is compared with the last good one: after a wrong bar the next one is judged by the bar before both.
    """
    split, jump = rules.of_bars("split"), rules.of_bars("jump")
    if not split and not jump:
        return
    level = np.log(series.columns["adjusted_close"])
    row = np.arange(len(level))
    change = np.diff(level, prepend=level[:1])  # that of a symbol's first bar is never looked at
    # What is wrong in the bars before is not to hide what is wrong now.
    most = np.log(jump["ratio"]) if jump else 0.5
    usual = np.clip(change, -most, most)
    lowest = np.minimum(np.maximum(series.begin + 1, row - rules.bars_before), row)
    count = row - lowest
    with np.errstate(invalid="ignore", divide="ignore"):
        sums, squares = _sums(usual, lowest, row), _sums(usual * usual, lowest, row)
        deviation = np.sqrt(np.maximum(squares - sums * sums / count, 0.0) / (count - 1))

    ratios = np.array(list(split["ratios"].values())) if split else np.array([])
    names = list(split["ratios"]) if split else []

    def suspicious(by: float, usually: float) -> tuple[Rule, str] | None:
        if split and abs(by) > SPLIT_DEVIATIONS * usually:
            away = np.abs(np.exp(by) / ratios - 1)
            if away.min() <= split["within"]:
                return split, names[int(away.argmin())]
        if jump and abs(by) > max(jump["deviations"] * usually, np.log(jump["ratio"])):
            return jump, ""
        return None

    # Any of these changes may be one; the others are none.
    least = min([most] + [abs(np.log(ratio)) - 2 * split["within"] for ratio in ratios] if split else [most])
    enough = count >= rules.fewest_bars
    candidates = np.flatnonzero(series.judged & enough & (np.abs(change) > max(least, 0.0)))
    done = -1
    for candidate in candidates:
        if candidate <= done:
            continue
        good, end = int(candidate) - 1, int(series.end[candidate])
        usually = float(deviation[candidate])
        for i in range(int(candidate), end):
            done = i
            by = float(level[i] - level[good])
            named = suspicious(by, usually) if series.judged[i] else None
            if not named:
                good = i
                break
            rule, ratio = named
            confirmed = _confirmed(level[i + 1 : min(end, i + 1 + rules.confirmed_by)], level[i], level[good], rules)
            said = _said(rule, ratio, series, i, good, by, usually, int(count[candidate]))
            if confirmed:
                yield Finding(i, rule.rule, "", "warn", f"{said}; the {rules.confirmed_by} bars after it confirm it")
            else:
                yield Finding(i, rule.rule, "", rule.severity, said)
            if confirmed or rule.severity == "warn":
                break  # the next bar is judged by this one, as the changes above are


def _confirmed(later: Floats, new: float, old: float, rules: Rules) -> bool:
    nearer = np.abs(later - new) < np.abs(later - old)
    return len(later) >= rules.confirmed_by and bool(nearer.mean() > 0.5)


def _said(rule: Rule, ratio: str, series: Series, row: int, good: int, by: float, usually: float, count: int) -> str:
    close = series.columns["adjusted_close"]
    times = f"{np.exp(by):.2f} times {close[good]:g}, that of {series.day(good)}"
    if rule.rule == "split":
        return (
            f"adjusted_close is {close[row]:g}, {times}, as after a split of {ratio} for which prices are not adjusted"
        )
    many = f"{abs(by) / usually:,.0f} deviations" if usually > 0 else "many deviations"
    return f"adjusted_close is {close[row]:g}, {times}: a jump by {many} of the {count} returns before"
