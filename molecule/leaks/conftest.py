"""One life of a stack, and one scan of everything that it left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import life
import pytest
from plants import Plants
from stack import Hit, Stack


class Evidence(NamedTuple):
    stack: Stack
    crashed: dict[str, tuple[str, str]]
    cores: list[str]
    hits: list[Hit]
    sizes: dict[str, int]


@pytest.fixture(scope="session")
def evidence(inventory: Any) -> Iterator[Evidence]:
    # What is kept holds every secret: it is for its owner alone, and is gone at the end.
    with tempfile.TemporaryDirectory(prefix="larder-leaks-") as work:
        stack = Stack(inventory, Path(work))
        plants = Plants(stack)
        try:
            with stack.sampled():
                crashed = life.live(stack)
                cores = life.core_files(stack)
                plants.plant()
            stack.ask_services()
            stack.keep_history(Path(__file__).parents[2])
            hits, sizes = stack.scan()
            yield Evidence(stack, crashed, cores, hits, sizes)
        finally:
            plants.remove()
