"""A fact about the stack: what is so, whether that is as it should be, and a sentence for people."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Only what has failed makes a stack unhealthy; a warning may be as it is meant."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fact:
    """The name is that of a metric without `larder_status_`, with the unit at its end.

    `of` says which view, service or slot it is about; the sentence has a line for each thing that is wrong.
    """

    name: str
    state: State
    value: float | None
    sentence: str
    of: str = ""


def told(facts: Iterable[Fact], *states: State) -> list[str]:
    """The sentences of the facts in these states; what is so of several views is said once."""
    about: dict[tuple[str, str], list[str]] = {}
    for fact in facts:
        if fact.state in states:
            about.setdefault((fact.name, fact.sentence), []).append(fact.of)
    return [
        f"{', '.join(of)}: {line}" if any(of) else line
        for (_, sentence), of in about.items()
        for line in sentence.splitlines()
    ]
