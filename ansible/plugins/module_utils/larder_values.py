"""The forms that a variable's value may have: each role's meta/stack.yml gives the forms of its variables.

A rule is one of

- ``{form: NAME, …}``: a function of FORMS and its arguments; ``also`` lists values that are right beside it;
- ``{each: RULE}`` for a list, with ``some: true`` where it may not be empty;
- ``{keys: RULE, values: RULE}`` or ``{fields: {NAME: RULE}}`` for a dictionary;
- ``{any: REASON}`` where no rule is possible, or something else judges.

A boolean needs no rule, and neither does a variable with choices in argument_specs.yml. No message of a form shows the
refused value: the value may be a secret.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

from cryptography import x509

Rule = Mapping[str, Any]
Fault = tuple[str, Any, str]  # where, the value there, what it must be

REDIS_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 2**10, "m": 10**6, "mb": 2**20, "g": 10**9, "gb": 2**30}
SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SECONDS = {
    unit: seconds
    for seconds, units in {
        1: "s sec second seconds",
        60: "m min minute minutes",
        3600: "h hr hour hours",
        86400: "d day days",
        604800: "w week weeks",
    }.items()
    for unit in units.split()
}
MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
WEEKDAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}
FULL_WEEKDAYS = {"sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"}
# Field, least, most, names.
CRON: tuple[tuple[str, int, int, Mapping[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 7, WEEKDAYS),
)
CRON_NAMES = {
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
CALENDAR_NAMES = {"minutely", "hourly", "daily", "weekly", "monthly", "quarterly"}
NAME = r"(?=[^\s]{1,253}$)(?!.*(?:^|\.)[0-9]+$)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*"
# Directories that the system owns, and those that the units cannot see: ProtectHome=, PrivateTmp=.
SYSTEM = re.compile(
    r"/(bin|boot|dev|etc|home|lib|lib64|proc|root|run|sbin|sys|tmp|usr|var/(run|tmp))(/.*)?|/[^/]+/?|/var/[^/]+/?"
)


def scalar(value: Any) -> str | None:
    """Return what a template writes for a text or a whole number; None for every other type that YAML may have made."""
    if isinstance(value, str):
        return str(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole and value.bit_length() < 128 else None


def number(value: Any, *, least: int, most: int, unit: str = "") -> str | None:
    """A whole number in decimal digits."""
    held = scalar(value)
    if held and re.fullmatch(r"-?(0|[1-9][0-9]{0,30})", held) and least <= int(held) <= most:
        return None
    return f"a whole number{f' of {unit}' if unit else ''}, {least} to {most}"


def share(value: Any) -> str | None:
    """A part of a whole, as YAML or a command line writes it."""
    held = scalar(value)
    if isinstance(value, float) and 0 <= value <= 1:
        return None
    if held and re.fullmatch(r"(0|1)(\.0{1,12})?|0\.[0-9]{1,12}", held):
        return None
    return "a share from 0 to 1, such as 0.01"


def text(value: Any, *, like: str, allowed: str, never: Sequence[str] = ()) -> str | None:
    """A text that a regular expression matches as a whole."""
    held = scalar(value)
    if held is not None and re.fullmatch(like, held, re.ASCII) and held not in never:
        return None
    return allowed + (f", and none of {', '.join(never)}" if never else "")


def numbers(field: str, least: int, most: int, names: Mapping[str, int]) -> set[int] | None:
    """Return what a field of cron allows; None where Debian's cron refuses the field, or ignores a part."""
    found: set[int] = set()
    for part in field.split(","):
        match = re.fullmatch(r"(?:(\*)|(\w{1,9})(?:-(\w{1,9}))?)(?:/([0-9]{1,3}))?", part, re.ASCII)
        if not match:
            return None
        every, first, last, step = match.groups()
        ends = [
            names.get(end.lower(), int(end) if end.isdecimal() else -1)
            for end in ((str(least), str(most)) if every else (first, last or first))
        ]
        low, high = ends
        # Cron accepts a step only after a range. A step that is longer than its range is a mistake that cron does
        # not report.
        if not least <= low <= high <= most or (step and not (every or last)):
            return None
        if step and not 1 <= int(step) <= max(high - low, 1):
            return None
        found |= set(range(low, high + 1, int(step or 1)))
    return found


def cron_fields(line: str) -> list[str] | None:
    fields = re.split("[ \t]+", CRON_NAMES.get(line, line).strip(" \t"))
    return fields if len(fields) == 5 else None


@cache
def longest_gap(line: str) -> int | None:
    """Return the most days between two days of a cron line; 0 where no day comes, None where it is not valid."""
    fields = cron_fields(line)
    if not fields:
        return None
    allowed = [numbers(field, *rule[1:]) for field, rule in zip(fields, CRON, strict=True)]
    if None in allowed:
        return None
    _, _, days, months, weekdays = (each or set() for each in allowed)
    # If day of month and day of week are both given, either is enough; a field that begins with * is not given.
    either = not fields[2].startswith("*") and not fields[4].startswith("*")
    # The calendar of 28 years has every date on every day of the week.
    start, last, gap = date(2000, 1, 1), None, 0
    for offset in range(28 * 366):
        day = start + timedelta(offset)
        by_date, by_week = day.day in days, bool({day.isoweekday() % 7, day.isoweekday()} & weekdays)
        if day.month in months and (by_date or by_week if either else by_date and by_week):
            gap = max(gap, (day - last).days if last else 1)
            last = day
    return gap


def cron(value: Any) -> str | None:
    """A line's five fields as Debian's cron runs them, or one of its names."""
    held = scalar(value) or ""
    gap = longest_gap(held) if len(held) < 200 else None
    if gap:
        return None
    if gap == 0:
        return "days that come: no month has one of these"
    fields = cron_fields(held)
    for field, rule in zip(fields or (), CRON, strict=False):
        if numbers(field, *rule[1:]) is None:
            names = f" ({', '.join(rule[3])})" if rule[3] else ""
            written = "written as *, 1, 1,3, 1-5, */2 or 0-10/2"
            return f"as crontab(5) says, its {rule[0]} {rule[1]} to {rule[2]}{names}, {written}"
    named = ", ".join(CRON_NAMES)
    return f"five fields (minute, hour, day of the month, month, day of the week) or {named}"


def seconds(value: Any) -> float | None:
    """Return the length of a time span as systemd.time(7) writes it; None where it is no time span, or infinite."""
    held = (scalar(value) or "").strip(" ")
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,6})?", held):
        return float(held)
    if len(held) > 100 or not re.fullmatch(r"([0-9]{1,15}(\.[0-9]{1,6})? *[a-z]+ *)+", held, re.ASCII):
        return None
    parts = re.findall(r"([0-9.]+) *([a-z]+)", held)
    return (
        sum(float(amount) * SECONDS[unit] for amount, unit in parts)
        if {unit for _, unit in parts} <= SECONDS.keys()
        else None
    )


def span(value: Any, *, least: str, most: str) -> str | None:
    """A time span, as systemd.time(7) writes it."""
    shortest, held, longest = seconds(least), seconds(value), seconds(most)
    if held is not None and shortest is not None and longest is not None and shortest <= held <= longest:
        return None
    return f"a time span such as 90s, 2h or 1h 30min, {least} to {most}"


def size(value: Any, *, least: str, most: str) -> str | None:
    """Memory, as systemd.resource-control(5) writes it: bytes, a number with K, M, G or T, or a share of the host's."""
    held, bounds = scalar(value) or "", (size_bytes(least), size_bytes(most))
    if re.fullmatch(r"[1-9][0-9]?%|100%", held):
        return None
    amount = size_bytes(held)
    if amount is not None and (bounds[0] or 0) <= amount <= (bounds[1] or 0):
        return None
    return f"memory such as 512M or 2G, {least} to {most}, or a share of the host's such as 50%"


def size_bytes(held: Any) -> int | None:
    match = re.fullmatch(r"([0-9]{1,18})([KMGT]?)", scalar(held) or "")
    return int(match[1]) * SIZES[match[2]] if match else None


def redis_bytes(held: Any) -> int | None:
    match = re.fullmatch(r"([0-9]{1,18})([kmg]?b?)", (scalar(held) or "").lower())
    return int(match[1]) * REDIS_UNITS[match[2]] if match else None


def redis_size(value: Any, *, least: str, most: str) -> str | None:
    """Memory, as redis.conf writes it."""
    amount, bounds = redis_bytes(value), (redis_bytes(least), redis_bytes(most))
    if amount is not None and (bounds[0] or 0) <= amount <= (bounds[1] or 0):
        return None
    return f"bytes, or a number with {', '.join(list(REDIS_UNITS)[1:])}, {least} to {most}"


def calendar_numbers(field: str, least: int, most: int) -> set[int] | None:
    found: set[int] = set()
    for part in field.split(","):
        match = re.fullmatch(r"(?:(\*)|([0-9]{1,2})(?:\.\.([0-9]{1,2}))?)(?:/([0-9]{1,2}))?", part)
        if not match:
            return None
        every, first, last, step = match.groups()
        low, high = (least, most) if every else (int(first), int(last or (most if step else first)))
        if not least <= low <= high <= most or (step and not 1 <= int(step) <= max(high - low, 1)) or (every and step):
            return None
        found |= set(range(low, high + 1, int(step or 1)))
    return found


def calendar_event(value: Any) -> str | None:
    """When a timer elapses, as systemd.time(7) writes it, again and again."""
    wrong = (
        "a calendar event such as daily, *-*-* 01:15:00 UTC or Mon..Fri 22:30, as in systemd.time(7), that comes again"
    )
    words = (scalar(value) or "").split(" ")
    if len(words) > 1 and not re.search(r"[*:]", words[-1]) and re.fullmatch(r"[A-Za-z0-9_+/-]+", words[-1]):
        if words[-1] != "UTC" and words[-1] not in available_timezones():
            return wrong
        words.pop()
    if words[0].lower() in CALENDAR_NAMES:
        return wrong if words[1:] else None
    day = r"([A-Za-z]+)"
    if re.fullmatch(rf"{day}(\.\.{day})?(,{day}(\.\.{day})?)*", words[0]):
        named = {word.lower() for word in re.findall(r"[A-Za-z]+", words.pop(0))}
        if not named <= WEEKDAYS.keys() | FULL_WEEKDAYS:
            return wrong
        if not words:
            return None
    if words and "-" in words[0]:
        parts = words.pop(0).split("-")
        if len(parts) == 3 and parts.pop(0) != "*":
            return wrong
        months, days = (
            (calendar_numbers(part, 1, most) for part, most in zip(parts, (12, 31), strict=False))
            if len(parts) == 2
            else (None, None)
        )
        if not months or not days or min(days) > max(calendar.monthrange(2000, month)[1] for month in months):
            return wrong
        if not words:
            return None
    times = words.pop(0).split(":") if words else []
    right = 2 <= len(times) <= 3 and all(
        calendar_numbers(part, 0, most) is not None for part, most in zip(times, (23, 59, 59), strict=False)
    )
    return None if right and not words else wrong


def address(value: Any, *, of: str, optional: bool = False) -> str | None:
    """An address: ``of`` a host (or its name), of one to listen at, of a network, or any source of connections.

    ``of`` several hosts, it is the one that each of them has in turn.
    """
    allowed = {
        "host": "the name or the address of one host",
        "several hosts": "an IPv4 address",
        "listener": "an address of the host itself, never all of them"
        + (", with a - before one it may lack" if optional else ""),
        "network": "a network with no bits set beyond its prefix, such as 192.0.2.17/32 or 192.0.2.0/24",
        "source": "an address, a name, or a network with no bits set beyond its prefix",
    }[of]
    held = scalar(value) or ""
    held = held.removeprefix("-") if optional else held
    if "%" in held:
        return allowed
    if "/" in held and of in {"network", "source"}:
        try:
            return None if ip_network(held).prefixlen and not ip_network(held).is_multicast else allowed
        except ValueError:
            return allowed
    try:
        single = ip_address(held)
    except ValueError:
        return None if re.fullmatch(NAME, held, re.ASCII) and of not in {"network", "several hosts"} else allowed
    if of == "several hosts" and (single.version != 4 or single.is_loopback):
        return allowed
    return allowed if of == "network" or single.is_unspecified or single.is_multicast else None


def package(value: Any) -> str | None:
    """A Debian package, of an architecture or a version where one is given."""
    named = re.fullmatch(r"[a-z0-9][a-z0-9.+-]+(:[a-z0-9]+)?(=[A-Za-z0-9.+:~-]+)?", scalar(value) or "", re.ASCII)
    return None if named else "the name of a Debian package"


def directory(value: Any) -> str | None:
    """A directory on the hosts that the stack may have for itself."""
    held = scalar(value) or ""
    plain = re.fullmatch(r"(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,100}){1,20}", held, re.ASCII)
    if plain and not SYSTEM.fullmatch(held):
        return None
    return (
        "a directory of its own such as /opt/feast or /srv/larder/incoming: an absolute path of letters, digits and "
        ". _ + -, not the system's, and not in /home, /root or /tmp, which services do not see"
    )


def file(value: Any, *, kind: str = "") -> str | None:
    """A path on the controller, of a ``certificate``, ``directory``, ``repository`` or ``file`` that is there."""
    what = {"": "file", "repository": "directory"}.get(kind, kind)
    allowed = f"the absolute path of a {what} on this machine" + (" that is there" if kind else "")
    held = scalar(value) or ""
    if not re.fullmatch(r"[/~][^\0\n\r]*", held) or (not kind and held == "/"):
        return allowed
    try:
        path = Path(held).expanduser()
        if kind == "directory":
            return None if path.is_dir() else allowed
        if kind == "repository":
            return repository(path) if path.is_dir() else allowed
        if kind:
            return None if path.is_file() and (kind != "certificate" or not certificate(path.read_text())) else allowed
    except (OSError, RuntimeError, ValueError):
        return allowed
    return None


def repository(path: Path) -> str | None:
    """A directory of text files: Ansible carries no others in a variable."""
    for each in sorted(path.rglob("*")):
        if each.is_file() and "__pycache__" not in each.parts:
            try:
                each.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return f"a directory of text files in UTF-8, and {each.relative_to(path)} in it is none"
    return None


def certificate(value: Any) -> str | None:
    """One certificate or several, in PEM."""
    try:
        x509.load_pem_x509_certificates(value.encode())
    except (AttributeError, ValueError):
        return "a certificate in PEM"
    return None


def zone(value: Any) -> str | None:
    """A time zone; where the controller has no list of zones, only the form of the name is judged."""
    held = scalar(value) or ""
    named = re.fullmatch(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}", held, re.ASCII)
    known = available_timezones()
    return None if named and (held in known or not known) else "a time zone such as Etc/UTC or Europe/Zurich"


FORMS: dict[str, Callable[..., str | None]] = {
    "address": address,
    "calendar": calendar_event,
    "certificate": certificate,
    "cron": cron,
    "directory": directory,
    "file": file,
    "number": number,
    "package": package,
    "redis_size": redis_size,
    "share": share,
    "size": size,
    "span": span,
    "text": text,
    "zone": zone,
}


def faults(where: str, value: Any, rule: Rule) -> Iterator[Fault]:
    """Judge a value by its rule."""
    if "form" in rule:
        also = rule.get("also", [])
        if isinstance(value, str) and value in also:
            return
        allowed = FORMS[rule["form"]](
            value, **{name: held for name, held in rule.items() if name not in {"form", "also"}}
        )
        if allowed:
            others = "".join(f", or {right!r}" for right in also)
            yield where, value, allowed + others
    elif "each" in rule:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            yield where, value, "a list"
        elif rule.get("some") and not value:
            yield where, value, "a list of at least one"
        else:
            for number_, item in enumerate(value):
                yield from faults(f"{where}[{number_}]", item, rule["each"])
    elif "keys" in rule or "fields" in rule:
        if not isinstance(value, Mapping):
            yield where, value, "a dictionary"
            return
        for key, item in value.items():
            wrong = [*faults(where, key, rule["keys"])] if "keys" in rule else []
            if wrong:
                yield f"a key of {where}", key, wrong[0][2]
            elif "keys" in rule:
                yield from faults(f"{where}.{key}", item, rule["values"])
            elif key in rule["fields"]:
                yield from faults(f"{where}.{key}", item, rule["fields"][key])
