"""Which backup a restore takes, and along which timeline it goes on from there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ansible.errors import AnsibleFilterError

MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d)(:\d\d)? ?(Z|UTC|[+-]\d\d:\d\d)?", re.ASCII)


def moment(text: str) -> datetime:
    """Return a moment that somebody typed; without a zone it is UTC."""
    found = MOMENT.fullmatch(text)
    try:
        if found:
            day, minute, second, zone = found.groups()
            zone = "+00:00" if zone in (None, "Z", "UTC") else zone
            return datetime.fromisoformat(f"{day} {minute}{second or ':00'}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):
        pass  # a day that no calendar has
    raise AnsibleFilterError(
        f"at is '{text}' and must be a moment such as '2026-11-25 09:30' or '2026-11-25 09:30:15+01:00'; without a "
        "zone it is UTC. Leave it out to restore all that was archived. Nothing was changed."
    )


def larder_backup_choice(
    held: Sequence[Mapping[str, Any]], histories: Mapping[str, Mapping[str, Any]], at: Any = None
) -> dict[str, Any]:
    """Return the newest backup from before a moment, and the timeline on which the database was at that moment.

    Takes what ``pgbackrest info`` and ``pgbackrest repo-ls`` of the archive say as JSON. A timeline begins when its
    history is archived, so the one of the moment is the last that had begun. ``timeline`` is empty where it is the
    newest of all, which PostgreSQL takes by itself; ``at`` is empty where all that was archived is asked for.
    """
    when = None if at is None else moment(str(at))
    if when and when > datetime.now(UTC):
        raise AnsibleFilterError(f"at is '{at}', which is in the future. Nothing was changed.")
    known = [stanza for stanza in held if stanza.get("db")]
    number = known[0]["db"][-1]["id"] if known else None
    # Backups of a former cluster (backup_new_cluster) have another number, and so has the folder of their WAL.
    backups = [each for stanza in known for each in stanza["backup"] if each["database"]["id"] == number]
    before = [each for each in backups if when is None or each["timestamp"]["stop"] < when.timestamp()]
    if not before:
        oldest = f"; the oldest ended at {clock(backups[0])}" if backups else ""
        which = f"from before {at}" if when else "of the present cluster"
        raise AnsibleFilterError(f"The repository has no backup {which}{oldest}. Nothing was changed.")
    chosen = before[-1]
    begun = {
        int(found[2], 16): entry["time"]
        for name, entry in histories.items()
        if (found := re.search(r"([0-9.]+-[0-9]+)/(?:[0-9A-F]+/)?([0-9A-F]{8})\.history$", name))
        and found[1].endswith(f"-{number}")
    }
    own = int(chosen["archive"]["start"][:8], 16)
    timeline = max([own, *(each for each, time in begun.items() if when and time <= when.timestamp())])
    return {
        "at": f"{when:%Y-%m-%d %H:%M:%S}+00" if when else "",
        "label": chosen["label"],
        "ended": clock(chosen),
        "size": chosen["info"]["size"],
        "timeline": "" if when is None or timeline == max([own, *begun]) else str(timeline),
    }


def clock(backup: Mapping[str, Any]) -> str:
    return f"{datetime.fromtimestamp(backup['timestamp']['stop'], UTC):%Y-%m-%d %H:%M:%S} UTC"


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"larder_backup_choice": larder_backup_choice}
