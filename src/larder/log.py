"""One line per event on stderr: `event key=value …`, with the journal's priorities where a unit runs it."""

import logging
import os
import sys
from typing import Any

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("larder")


class _Line(logging.Formatter):
    """A level's name for a person, its number for the journal, which sets JOURNAL_STREAM and keeps the time itself."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)-7s %(message)s")
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.journal:
            return text
        return "\n".join(f"<{_PRIORITY.get(record.levelno, 6)}>{line}" for line in text.splitlines())


def configure(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(journal="JOURNAL_STREAM" in os.environ))
    # Other libraries speak at debug only: at info, Feast's are not about the user's data.
    logging.basicConfig(level=logging.DEBUG if level == "debug" else logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(level.upper())


def printable(value: object) -> str:
    """Text as one line that any terminal, journal and database takes: what a name or a file holds may be anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def _value(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else printable(value)
    return f'"{text}"' if not text or any(c in text for c in ' ="') else text


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    logger.log(level, "%s", " ".join([name, *(f"{key}={_value(value)}" for key, value in fields.items())]))
