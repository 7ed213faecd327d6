"""What a feature repository says in quality.yml: by which rules bars and features are judged.

Ansible reads the same module on the controller, so it needs nothing but YAML.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from larder import strict_yaml

FILE = "quality.yml"
SCHEMA = "quality"
# Of a bar; what a view has follows from the repository.
NUMBERS = ("open", "high", "low", "close", "adjusted_close", "volume")


class RuleError(ValueError):
    """A rule is wrong: which one, what it holds, what is allowed."""


@dataclass(frozen=True)
class Rule:
    """A rule, its severity and its parameters."""

    rule: str
    severity: str
    of: str = ""  # a column of a bar, a view, or a feature as view:feature
    given: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.given[name]


@dataclass(frozen=True)
class Drift:
    """How distributions are compared with those of a reference window."""

    reference_days: int = 365
    window_days: int = 7
    bins: int = 10
    fewest_symbols: int = 30
    psi: float = 0.25
    ks: float = 0.2
    nulls: float = 0.1
    raise_after: int = 2
    clear_after: int = 3
    scaled: Mapping[str, str] = field(default_factory=dict)  # feature to the column whose mean it is divided by
    left_out: Sequence[str] = ()
    groups: Mapping[str, str] = field(default_factory=dict)  # name to a regular expression of keys

    @property
    def judged(self) -> str:
        """What a reference depends on; with other values it is made anew."""
        return repr((self.reference_days, sorted(self.scaled.items()), sorted(self.groups.items())))


@dataclass(frozen=True)
class Rules:
    """The rules of a repository, by when they are judged."""

    bars: Sequence[Rule] = ()  # at load, each bar with those before it
    days: Sequence[Rule] = ()  # after compute, all symbols together
    features: Sequence[Rule] = ()  # after compute
    drift: Drift | None = None
    # Of a bar's history: how many bars before it are looked at, how few are too few, how many later ones confirm it.
    bars_before: int = 60
    fewest_bars: int = 20
    confirmed_by: int = 5

    def __bool__(self) -> bool:
        return bool(self.bars or self.days or self.features or self.drift)

    def of_bars(self, rule: str) -> Rule | None:
        return next((each for each in self.bars if each.rule == rule), None)

    def tables(self) -> list[dict[str, Any]]:
        """The tables in which findings, quarantined bars and drift are kept, as tables.yml would declare them."""
        return list(TABLES) if self else []


Check = Callable[[Any], Any]


def _number(allowed: str, least: float = -math.inf, most: float = math.inf, *, whole: bool = False) -> Check:
    def check(value: Any) -> Any:
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(allowed)
        return value if whole else float(value)

    return check


def _ratios(value: Any) -> dict[str, float]:
    """`2:1` is two new shares for an old one: the price falls to a half."""
    found = {}
    for text in value if isinstance(value, list) else [None]:
        match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text) if isinstance(text, str) else None
        if not match or match[1] == match[2]:
            raise ValueError('a list of ratios such as "2:1"')
        found[match[0]] = int(match[2]) / int(match[1])
    return found


ANY = _number("a number")
SHARE = _number("a share from 0 to 1", 0, 1)
RATIO = _number("a ratio above 1", math.nextafter(1, 2))
POSITIVE = _number("a number above 0", math.ulp(0))
COUNT = _number("a whole number from 1 to 1000", 1, 1000, whole=True)

AT_LOAD = ("reject", "quarantine", "warn")
AFTER = ("warn", "fail")


@dataclass(frozen=True)
class _Kind:
    """A rule's name, what it is about, and its parameters: those that it needs, and those that it may have."""

    severities: Sequence[str]
    about: str = ""
    needed: Mapping[str, Check] = field(default_factory=dict)
    allowed: Mapping[str, Check] = field(default_factory=dict)
    once: bool = False


RANGE = {"least": ANY, "most": ANY}
KINDS: Mapping[str, Mapping[str, _Kind]] = {
    "bars": {
        "range": _Kind(AT_LOAD, "column", {}, RANGE),
        "jump": _Kind(AT_LOAD, "", {"deviations": POSITIVE, "ratio": RATIO}, once=True),
        "split": _Kind(AT_LOAD, "", {"ratios": _ratios, "within": SHARE}, once=True),
        "spike": _Kind(AT_LOAD, "column", {"times": RATIO}),
        "repeat": _Kind(
            AT_LOAD, "", {"bars": _number("a whole number from 2 to 1000", 2, 1000, whole=True)}, once=True
        ),
    },
    "days": {
        "gap": _Kind(AFTER, "", {"days": COUNT}, once=True),
        "frozen": _Kind(
            AFTER, "", {"bars": _number("a whole number from 2 to 20", 2, 20, whole=True), "most": SHARE}, once=True
        ),
    },
    "features": {
        "range": _Kind(AFTER, "feature", {}, RANGE),
        "nulls": _Kind(AFTER, "view or feature", {"most": SHARE}, {"after": _number("0 to 5000", 0, 5000, whole=True)}),
    },
}
HISTORY: Mapping[str, Check] = {
    "bars_before": _number("a whole number from 5 to 250", 5, 250, whole=True),
    "fewest_bars": _number("a whole number from 2 to 250", 2, 250, whole=True),
    "confirmed_by": COUNT,
}
DRIFT: Mapping[str, Check] = {
    "reference_days": _number("a whole number from 30 to 3650", 30, 3650, whole=True),
    "window_days": _number("a whole number from 1 to 90", 1, 90, whole=True),
    "bins": _number("a whole number from 4 to 50", 4, 50, whole=True),
    "fewest_symbols": _number("a whole number from 5 up", 5, 10**6, whole=True),
    "psi": POSITIVE,
    "ks": SHARE,
    "nulls": SHARE,
    "raise_after": COUNT,
    "clear_after": COUNT,
}


Features = Mapping[str, Sequence[str]]


def read(repository: Path, features: Features | None = None) -> Rules:
    """Read and judge a repository's quality.yml; no rules where it has none. Raises RuleError.

    `features`: those that rules may name, as view:feature, each with the columns of its source.
    """
    path = repository / FILE
    if not path.exists():
        return Rules()
    try:
        declared = strict_yaml.read(path)
    except ValueError as error:
        raise RuleError(str(error)) from None
    _known(declared, "", (*KINDS, "history", "drift"))
    bars, days, after = (tuple(_rules(part, declared.get(part) or [], features)) for part in KINDS)
    history = _values(declared.get("history") or {}, "history", HISTORY)
    if history.get("fewest_bars", Rules.fewest_bars) > history.get("bars_before", Rules.bars_before):
        raise RuleError(
            f"{FILE}: history: fewest_bars is {history.get('fewest_bars', Rules.fewest_bars)}; it may not be more than "
            f"bars_before, {history.get('bars_before', Rules.bars_before)}."
        )
    drift = _drift(declared["drift"] or {}, features) if "drift" in declared else None
    return Rules(bars, days, after, drift, **history)


def _known(entry: object, where: str, names: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise RuleError(f"{FILE}: {where}{entry!r} is no mapping.")
    for name in entry:
        if name not in {*names}:
            raise RuleError(f"{FILE}: {where}{name} is unknown; there may be {', '.join(sorted(names))}.")
    return entry


def _values(entry: object, where: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    return {
        name: _value(value, where, name, checks[name]) for name, value in _known(entry, f"{where}: ", checks).items()
    }


def _value(value: object, where: str, name: str, check: Check) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise RuleError(f"{FILE}: {where}: {name} is {value!r}; it has to be {error}.") from None


def _rules(part: str, entries: object, features: Features | None) -> Iterable[Rule]:
    if not isinstance(entries, list):
        raise RuleError(f"{FILE}: {part} holds {entries!r}; it has to be a list of rules.")
    seen: set[tuple[str, str]] = set()
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or entry.get("rule") not in KINDS[part]:
            raise RuleError(
                f"{FILE}: {part}: entry {number} is {entry!r}; it has to be a mapping with a rule, one of "
                f"{', '.join(KINDS[part])}."
            )
        rule = _rule(part, entry, features)
        if (rule.rule, rule.of) in seen:
            raise RuleError(f"{FILE}: {part} has the rule {rule.rule} {rule.of}".rstrip() + " twice.")
        seen.add((rule.rule, rule.of))
        yield rule


def _rule(part: str, entry: Mapping[str, Any], features: Features | None) -> Rule:
    kind = KINDS[part][entry["rule"]]
    where = f"{part}: {entry['rule']}"
    about = kind.about.split(" or ") if kind.about else []
    checks = {**kind.needed, **kind.allowed}
    _known(entry, f"{where}: ", ("rule", "severity", *about, *checks))
    named = [name for name in about if name in entry]
    if about and len(named) != 1:
        raise RuleError(f"{FILE}: {where}: it needs a {kind.about}.")
    of: Any = entry[named[0]] if named else ""
    for name in named:
        _check_name(where, name, of, features)
        where += f" {of}"
    for name in kind.needed:
        if name not in entry:
            raise RuleError(f"{FILE}: {where} lacks {name}.")
    given = {name: _value(entry[name], where, name, check) for name, check in checks.items() if name in entry}
    if entry["rule"] == "range":
        if not given:
            raise RuleError(f"{FILE}: {where} lacks least, or most, or both.")
        if given.get("least", -math.inf) > given.get("most", math.inf):
            raise RuleError(f"{FILE}: {where}: least is {given['least']}; it may not be above most, {given['most']}.")
    severity = entry.get("severity")
    if severity not in kind.severities:
        raise RuleError(f"{FILE}: {where}: severity is {severity!r}; it may be {', '.join(kind.severities)}.")
    return Rule(entry["rule"], str(severity), of, given)


def _check_name(where: str, kind: str, of: object, features: Features | None) -> None:
    if kind == "column":
        if of not in NUMBERS:
            raise RuleError(f"{FILE}: {where}: column is {of!r}; it may be {', '.join(NUMBERS)}.")
        return
    if not isinstance(of, str):
        raise RuleError(f"{FILE}: {where}: {kind} is {of!r}; it has to be a name.")
    if features is not None:
        known = features.keys() if kind == "feature" else {name.split(":")[0] for name in features}
        if of not in known:
            raise RuleError(f"{FILE}: {where}: there is no computed {kind} {of!r}; larder features lists them.")


def _drift(entry: object, features: Features | None) -> Drift:
    declared = _known(entry, "drift: ", (*DRIFT, "scaled", "left_out", "groups"))
    values = _values({name: value for name, value in declared.items() if name in DRIFT}, "drift", DRIFT)
    scaled: dict[str, str] = {}
    for column, names in _mapping(declared.get("scaled") or {}, "drift: scaled").items():
        if not isinstance(column, str):
            raise RuleError(f"{FILE}: drift: scaled: {column!r} is no column.")
        those = _names(names, f"drift: scaled: {column}", features)
        for name in those:
            if features is not None and column not in features[name]:
                raise RuleError(
                    f"{FILE}: drift: scaled: {name} is computed from a table without a column {column}; it has "
                    f"{', '.join(features[name])}."
                )
        scaled |= dict.fromkeys(those, column)
    groups = _mapping(declared.get("groups") or {}, "drift: groups")
    for name, pattern in groups.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
            raise RuleError(f"{FILE}: drift: groups: {name!r} needs a name of small letters, digits and _, at most 31.")
        try:
            re.compile(pattern)
        except (re.error, TypeError):
            raise RuleError(
                f"{FILE}: drift: groups: {name} is {pattern!r}; it has to be a regular expression of symbols."
            ) from None
    left_out = _names(declared.get("left_out") or [], "drift: left_out", features)
    if both := sorted({*left_out} & scaled.keys()):
        raise RuleError(f"{FILE}: drift: {both[0]} is scaled and left_out; it may be one of them.")
    return Drift(**values, scaled=scaled, left_out=tuple(left_out), groups=groups)


def _mapping(entry: object, where: str) -> dict[Any, Any]:
    if not isinstance(entry, dict):
        raise RuleError(f"{FILE}: {where} holds {entry!r}; it has to be a mapping.")
    return entry


def _names(entry: object, where: str, features: Features | None) -> list[str]:
    """Features, or with `view:*` all of a view."""
    if not isinstance(entry, list) or not all(isinstance(name, str) for name in entry):
        raise RuleError(f"{FILE}: {where} holds {entry!r}; it has to be a list of features.")
    found: list[str] = []
    for name in entry:
        view, _, feature = name.partition(":")
        those = (
            [name]
            if features is None or feature != "*"
            else sorted(known for known in features if known.split(":")[0] == view)
        )
        if features is not None and (not those or not {*those} <= features.keys()):
            raise RuleError(f"{FILE}: {where}: there is no computed feature {name!r}; larder features lists them.")
        found += those
    return found


_KEY = [
    {"name": "symbol", "type": "text", "nullable": False},
    {"name": "event_timestamp", "type": "timestamptz", "nullable": False},
]
_FEATURE = [
    {"name": "view", "type": "text", "nullable": False},
    {"name": "feature", "type": "text", "nullable": False},
    {"name": "symbols", "type": "text", "nullable": False},  # a group's name; empty for all
]
_CHANGE = ["select", "insert", "update", "delete"]
TABLES: tuple[dict[str, Any], ...] = (
    {
        # What a rule found: at load of a bar, after compute of a symbol, a day or a feature.
        "name": f"{SCHEMA}.findings",
        "columns": [
            *_KEY,
            {"name": "rule", "type": "text", "nullable": False},
            {"name": "of", "type": "text", "nullable": False},  # the column or the feature
            {"name": "severity", "type": "text", "nullable": False},
            {"name": "message", "type": "text", "nullable": False},
            {"name": "load_id", "type": "integer"},  # of market_data.loads; none where it was found after compute
            {"name": "found_at", "type": "timestamptz", "nullable": False, "default": "clock_timestamp()"},
        ],
        "primary_key": ["symbol", "event_timestamp", "rule", "of"],
        "indexes": [{"columns": ["found_at"]}],
        "grants": {"load": _CHANGE, "pipeline": _CHANGE, "train": ["select"]},
    },
    {
        # Bars that are kept, and used for nothing until somebody decides.
        "name": f"{SCHEMA}.quarantine",
        "columns": [
            *_KEY,
            *({"name": name, "type": "double precision", "nullable": name == "volume"} for name in NUMBERS),
            {"name": "reason", "type": "text", "nullable": False},
            {"name": "load_id", "type": "integer"},
            {"name": "file", "type": "text", "nullable": False},
            # held, released, dropped, or replaced by another bar of the day
            {"name": "state", "type": "text", "nullable": False},
            {"name": "held_at", "type": "timestamptz", "nullable": False, "default": "clock_timestamp()"},
            {"name": "decided_at", "type": "timestamptz"},
            {"name": "decided_by", "type": "text"},
        ],
        "primary_key": ["symbol", "event_timestamp"],
        "grants": {"load": _CHANGE, "pipeline": ["select"], "train": ["select"]},
    },
    {
        # When what was judged after compute; `noted` has what was measured.
        "name": f"{SCHEMA}.checks",
        "columns": [
            {"name": "what", "type": "text", "nullable": False},
            {"name": "checked_at", "type": "timestamptz", "nullable": False, "default": "clock_timestamp()"},
            {"name": "host", "type": "text", "nullable": False},
            {"name": "noted", "type": "jsonb", "nullable": False},
        ],
        "primary_key": ["what"],
        "grants": {"pipeline": _CHANGE, "train": ["select"]},
    },
    {
        # The distribution of a feature in its reference window: 100 bins of about equal counts, and what is between.
        "name": f"{SCHEMA}.references",
        "columns": [
            *_FEATURE,
            {"name": "judged", "type": "text", "nullable": False},  # for which definition and settings
            {"name": "since", "type": "timestamptz", "nullable": False},
            {"name": "until", "type": "timestamptz", "nullable": False},
            {"name": "edges", "type": "double precision[]", "nullable": False},
            {"name": "counts", "type": "bigint[]", "nullable": False},
            {"name": "nulls", "type": "bigint", "nullable": False},
            {"name": "symbol_count", "type": "bigint", "nullable": False},
            {"name": "mean", "type": "double precision"},
            {"name": "deviation", "type": "double precision"},
            {"name": "made_at", "type": "timestamptz", "nullable": False, "default": "clock_timestamp()"},
        ],
        "primary_key": ["view", "feature", "symbols"],
        "grants": {"pipeline": _CHANGE, "train": ["select"]},
    },
    {
        # How a feature's distribution in the window up to a day differs from its reference.
        "name": f"{SCHEMA}.drift",
        "columns": [
            {"name": "day", "type": "date", "nullable": False},
            *_FEATURE,
            {"name": "counts", "type": "bigint[]", "nullable": False},
            {"name": "nulls", "type": "bigint", "nullable": False},
            {"name": "symbol_count", "type": "bigint", "nullable": False},
            {"name": "psi", "type": "double precision"},
            {"name": "psi_expected", "type": "double precision"},  # without drift, of so few symbols
            {"name": "ks", "type": "double precision"},
            {"name": "null_ratio", "type": "double precision"},
            {"name": "reference_null_ratio", "type": "double precision"},
            {"name": "mean", "type": "double precision"},
            {"name": "deviation", "type": "double precision"},
            {"name": "days_beyond", "type": "integer", "nullable": False},  # in a row, beyond a threshold
            {"name": "days_within", "type": "integer", "nullable": False},
            {"name": "moved", "type": "boolean", "nullable": False},
        ],
        "primary_key": ["view", "feature", "symbols", "day"],
        "grants": {"pipeline": _CHANGE, "train": ["select"]},
    },
)
