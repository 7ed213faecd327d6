"""The direction of imports in src/larder: what a part is made of stands below it, and never asks back."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src/larder"
# From the bottom to the top. A part imports from itself and from lower layers, not from others of its own layer.
PARTS = (
    "errors log origin strict_yaml",
    "feast_version",
    "postgres",
    "quality",
    "bars features plugins serving",
    "operations",
    "cli",
)
# The same within a part; `bars` is its __init__.
MODULES = {
    "postgres": ("binary session", "arrays tables"),
    "quality": ("rules", "judge", "gate"),
    "bars": (
        "model source",
        "catalogue numbers",
        "dates recognise settings",
        "sheets",
        "survey",
        "judge",
        "bars",
        "reader report",
        "load",
    ),
    "features": ("definitions", "feast_views formulas", "record", "compute"),
    "plugins": ("offline_store online_store", "compute_engine"),
    "serving": (
        "metrics",
        "checks drain failures redis_line turns",
        "explain push query",
        "plan",
        "answer hashes served",
        "online",
        "application",
        "feast_ui gunicorn",
    ),
    "operations": (
        "credentials facts feast_store registry",
        "active backups evictions freshness join lineage metrics probe runs",
        "apply check explain materialize quarantine",
        "drift quality skew verify",
        "drift_report survey",
        "checks status",
        "pipeline",
    ),
}


def modules() -> dict[str, Path]:
    """Return the package's files by the names of their modules, without `larder.`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__")
        found[name.removesuffix(".")] = path
    return found


def imported(source: str) -> Iterator[str]:
    """Return the names in the package that a module imports, at once, on first use, or for its types."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("larder.") for alias in node.names if alias.name.startswith("larder."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            if node.module == "larder":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("larder."):
                known, module = modules(), node.module.removeprefix("larder.")
                yield from (f"{module}.{a.name}" if f"{module}.{a.name}" in known else module for a in node.names)


def wrong(module: str, imports: str, layers: Sequence[str]) -> bool:
    """Return whether one of these may not import from the other."""
    height = {name: number for number, layer in enumerate(layers) for name in layer.split()}
    return module != imports and height[imports] >= height[module]


def faults(module: str, source: str) -> list[str]:
    part, _, own = module.partition(".")
    found = []
    for name in imported(source):
        other, _, others = name.partition(".")
        if other != part:
            bad = wrong(part, other, PARTS)
        else:
            bad = part in MODULES and wrong(own or part, others or other, MODULES[part])
        if bad:
            found.append(f"{module} imports {name}")
    return found


def test_every_module_has_its_layer() -> None:
    known = {part for layer in PARTS for part in layer.split()}
    known |= {f"{part}.{name}" for part, layers in MODULES.items() for layer in layers for name in layer.split()}
    assert known - {"bars.bars"} == set(modules()) - {""}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downwards(module: str) -> None:
    assert faults(module, modules()[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("errors", "from larder import log"),
        ("bars.model", "from larder.bars import Batch"),
        ("bars.load", "from larder.operations.credentials import Credentials"),
        ("features.compute", "def late():\n    from larder.bars import load"),
        ("plugins.offline_store", "from larder.serving.failures import is_outage"),
        ("serving.query", "from larder.serving import failures, online"),
        ("operations.runs", "import larder.cli"),
    ],
)
def test_an_import_that_points_upwards_or_sideways_is_found(module: str, planted: str) -> None:
    assert len(faults(module, planted)) == 1
