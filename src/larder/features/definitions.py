"""What a feature repository declares in computed_views.yml: views whose features are formulas of a table's columns.

One entry defines a feature; its column, its Feast field, its computation and its documentation are made of it. Ansible
reads the same module on the controller, so it needs nothing but YAML.
"""

import ast
import builtins
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from larder import strict_yaml

FILE = "computed_views.yml"
SCHEMA = "features"
# Feast's type of a feature, and its column's.
TYPES = {"Float64": "double precision", "Int64": "bigint"}
KEY_TYPES = ("text", "bigint")
NUMBERS = ("double precision", "real", "numeric", "bigint", "integer", "smallint")
# The source's columns with nothing changed; the variable pipeline_indicator_prices.
GIVEN = ("as_loaded", "indicator_prices")
# Which load brought a bar, and which run wrote a row of a view: no formula reads these.
LOAD, RUN = "load_id", "run_id"
# `larder load` notes which bars changed; what changed in any other table is found by comparing.
NOTED = {"market_data.ohlcv_daily": "market_data.pending_compute"}


class DefinitionError(ValueError):
    """A declaration is wrong: which one, what it holds, what is allowed."""


@dataclass(frozen=True)
class Feature:
    """A column of a view: one value per row of the source."""

    name: str
    formula: str  # of a running total: what each row adds
    running_total: bool = False
    type: str = "Float64"
    description: str = ""


@dataclass(frozen=True)
class View:
    """A feature view, kept in the hypertable `features.<name>`."""

    name: str
    source: str
    features: tuple[Feature, ...]
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    ttl_days: int = 730
    chunk_interval: str = "365 days"

    @property
    def table(self) -> str:
        return f"{SCHEMA}.{self.name}"


@dataclass(frozen=True)
class Source:
    """A table that views are computed from: one row per key and time."""

    table: str
    key: str
    key_type: str
    time: str
    columns: tuple[str, ...]  # those that are numbers
    terms: Mapping[str, str] = field(default_factory=dict)
    rows_before: int = 1250

    @property
    def notes(self) -> str | None:
        """The table of keys whose rows changed, with the earliest such row."""
        return NOTED.get(self.table)


@dataclass(frozen=True)
class Definitions:
    """The views of a repository, and their sources by table."""

    views: tuple[View, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)
    module: bytes = b""  # formulas.py

    def features(self) -> dict[str, tuple[str, ...]]:
        """All features, as view:feature, each with the columns of its source."""
        return {f"{v.name}:{f.name}": self.sources[v.source].columns for v in self.views for f in v.features}

    def views_of(self, source: Source) -> list[View]:
        return [view for view in self.views if view.source == source.table]

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that a value depends on: not of descriptions, nor of which views there are beside a view."""
        said = [
            [view.name, view.source, [[f.name, f.formula, f.running_total, f.type] for f in view.features]]
            for view in self.views
        ]
        text = json.dumps([said, [asdict(source) for source in self.sources.values()]], sort_keys=True)
        return hashlib.sha256(text.encode() + self.module).hexdigest()

    def tables(self) -> list[dict[str, Any]]:
        """The tables of the views and of what `larder compute` remembers, as tables.yml would declare them."""
        if not self.views:
            return []
        return [*BOOKKEEPING, *(self._table(view) for view in self.views)]

    def _table(self, view: View) -> dict[str, Any]:
        source = self.sources[view.source]
        return {
            "name": view.table,
            "columns": [
                {"name": source.key, "type": source.key_type, "nullable": False},
                {"name": source.time, "type": "timestamptz", "nullable": False},
                *({"name": feature.name, "type": TYPES[feature.type]} for feature in view.features),
                {"name": RUN, "type": "integer"},
            ],
            "primary_key": [source.key, source.time],
            "hypertable": {"time_column": source.time, "chunk_interval": view.chunk_interval},
            "indexes": [{"columns": [f"{source.time} DESC"]}],
            "grants": {"pipeline": ["select", "insert", "update"], "train": ["select"]},
        }


BOOKKEEPING: tuple[dict[str, Any], ...] = (
    {
        # The earliest row per key that changed since the online store was written; the key as text.
        "name": f"{SCHEMA}.pending_materialize",
        "columns": [
            {"name": "symbol", "type": "text", "nullable": False},
            {"name": "since", "type": "timestamptz", "nullable": False},
            {"name": "noted_at", "type": "timestamptz", "nullable": False, "default": "clock_timestamp()"},
        ],
        "primary_key": ["symbol"],
        "grants": {"pipeline": ["select", "insert", "update", "delete"]},
    },
    {
        # Which definitions the features were computed with: other ones, and every key is computed anew.
        "name": f"{SCHEMA}.computed_with",
        "columns": [{"name": "fingerprint", "type": "text", "nullable": False}],
        "grants": {"pipeline": ["select", "insert", "delete"]},
    },
    {
        # Computations that wrote rows; rows from before they were noted have none.
        "name": f"{SCHEMA}.runs",
        "columns": [
            {"name": RUN, "type": "integer", "nullable": False},
            {"name": "source", "type": "text", "nullable": False},
            {"name": "began_at", "type": "timestamptz", "nullable": False, "default": "clock_timestamp()"},
            {"name": "fingerprint", "type": "text", "nullable": False},
            {"name": "host", "type": "text", "nullable": False},
            {"name": "code", "type": "text", "nullable": False},
            {"name": "invocation", "type": "text"},
        ],
        "primary_key": [RUN],
        "grants": {"pipeline": ["select", "insert"], "train": ["select"]},
    },
    {
        # What the rows of each key were when they were computed, for sources in which nobody notes what changed.
        "name": f"{SCHEMA}.computed_rows",
        "columns": [
            {"name": "source", "type": "text", "nullable": False},
            {"name": "key", "type": "text", "nullable": False},
            {"name": "checksum", "type": "text", "nullable": False},
        ],
        "primary_key": ["source", "key"],
        "grants": {"pipeline": ["select", "insert", "update", "delete"]},
    },
)


def read(repository: Path) -> Definitions:
    """Read and judge what a repository declares; nothing where it has no computed_views.yml. Raises DefinitionError."""
    path = repository / FILE
    if not path.exists():
        return Definitions()
    declared = _shape(_yaml(path), "", {"views"}, {"sources"})
    tables = {table["name"]: table for table in read_tables(repository / "tables.yml")["tables"]}
    code = repository / "formulas.py"
    module = code.read_bytes() if code.exists() else b""
    said = {}
    for each in _list(declared["sources"], "sources") if "sources" in declared else ():
        entry = _shape(each, "sources: ", {"table"}, {"terms", "rows_before"})
        if entry["table"] in said:
            raise DefinitionError(f"{FILE} names the source {entry['table']} twice.")
        said[entry["table"]] = entry
    views = tuple(_views(declared["views"]))
    sources = {
        table: _source(table, said.pop(table, {}), tables) for table in dict.fromkeys(view.source for view in views)
    }
    if said:
        raise DefinitionError(f"{FILE} has the source {next(iter(said))}, and no view is computed from it.")
    for view in views:
        if view.table in tables:
            raise DefinitionError(f"tables.yml has the table {view.table}, which is made of {FILE}: take it out there.")
    definitions = Definitions(views, sources, module)
    for source in sources.values():
        _check_names(source, definitions.views_of(source), module)
    return definitions


def read_tables(path: Path) -> dict[str, list[Any]]:
    """Read a repository's tables.yml: its schemas and tables, whose format the module timescaledb_tables judges."""
    loaded = _yaml(path)
    for name in ("schemas", "tables"):
        if not isinstance(loaded.get(name), list):
            raise DefinitionError(f"{path} has {name} {loaded.get(name)!r}; it has to be a list.")
    for table in loaded["tables"]:
        if not isinstance(table, dict) or not {"name", "columns"} <= table.keys():
            raise DefinitionError(f"{path} has the table {table!r}; it has to be a mapping with a name and columns.")
    return loaded


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return strict_yaml.read(path)
    except ValueError as error:
        raise DefinitionError(str(error)) from None


def _shape(entry: object, where: str, needed: set[str], allowed: Iterable[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DefinitionError(f"{FILE}: {where}{entry!r} is no mapping.")
    known = needed | set(allowed)
    for name in entry:
        if name not in known:
            raise DefinitionError(f"{FILE}: {where}{name} is unknown; there may be {', '.join(sorted(known))}.")
    for name in sorted(needed - entry.keys()):
        raise DefinitionError(f"{FILE}: {where}{entry.get('name', '')} lacks {name}.")
    return entry


def _list(entries: object, where: str) -> list[Any]:
    if not isinstance(entries, list) or not entries:
        raise DefinitionError(f"{FILE}: {where} holds {entries!r}; it has to be a list.")
    return entries


def _views(entries: object) -> Iterator[View]:
    seen: set[str] = set()
    for each in _list(entries, "views"):
        entry = _shape(
            each, "views: ", {"name", "source", "features"}, {"description", "tags", "ttl_days", "chunk_interval"}
        )
        name = _name(entry["name"], "the view")
        if name in seen:
            raise DefinitionError(f"{FILE} has two views {name}.")
        seen.add(name)
        ttl = entry.get("ttl_days", View.ttl_days)
        if type(ttl) is not int or not 1 <= ttl <= 36500:
            raise DefinitionError(f"{FILE}: {name} has ttl_days {ttl!r}; it may be 1 to 36500.")
        tags = entry.get("tags", {})
        if not isinstance(tags, dict) or not all(isinstance(text, str) for text in (*tags, *tags.values())):
            raise DefinitionError(f"{FILE}: {name} has the tags {tags!r}; they have to be names and texts.")
        features = tuple(_feature(name, feature) for feature in _list(entry["features"], f"{name}: features"))
        yield View(**{**entry, "features": features})


def _feature(view: str, each: object) -> Feature:
    entry = _shape(each, f"{view}: ", {"name"}, {"formula", "running_total", "type", "description"})
    name = _name(entry["name"], f"{view}: the feature")
    where = f"{view}.{name}"
    formulas = [entry[kind] for kind in ("formula", "running_total") if kind in entry]
    if len(formulas) != 1 or not isinstance(formulas[0], str):
        raise DefinitionError(f"{FILE}: {where} needs a text for either formula or running_total.")
    kind = entry.get("type", "Float64")
    if kind not in TYPES:
        raise DefinitionError(f"{FILE}: {where} has the type {kind!r}; it may be {' or '.join(TYPES)}.")
    description = entry.get("description", "")
    if not isinstance(description, str):
        raise DefinitionError(f"{FILE}: {where} has the description {description!r}; it has to be a text.")
    _parse(formulas[0], where)
    return Feature(name, formulas[0], "running_total" in entry, kind, description)


def _name(name: object, what: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", name):
        raise DefinitionError(f"{FILE}: {what} {name!r} needs a name of small letters, digits and _, at most 63.")
    return name


def _source(name: str, entry: Mapping[str, Any], tables: Mapping[str, Any]) -> Source:
    table = tables.get(name)
    if table is None:
        raise DefinitionError(f"{FILE} computes from {name}, which tables.yml does not declare.")
    types = {column["name"]: column["type"] for column in table["columns"]}
    key, *others = table.get("primary_key") or ["?"]
    time = (table.get("hypertable") or {}).get("time_column", "?")
    if types.get(key) not in KEY_TYPES or others != [time]:
        raise DefinitionError(
            f"{FILE} computes from {name}; that has to be a hypertable whose primary key is one column "
            f"({' or '.join(KEY_TYPES)}) and its time."
        )
    if "select" not in (table.get("grants") or {}).get("pipeline", []):
        raise DefinitionError(f"{FILE} computes from {name}; its grants in tables.yml have to give select to pipeline.")
    columns = tuple(c for c, kind in types.items() if kind in NUMBERS and c not in (key, time, LOAD))
    terms, before = entry.get("terms", {}), entry.get("rows_before", Source.rows_before)
    if not isinstance(terms, dict):
        raise DefinitionError(f"{FILE}: the terms of {name} hold {terms!r}; they have to be names and formulas.")
    for term, formula in terms.items():
        _name(term, f"a term of {name},")
        _parse(formula, f"the term {term}")
    if type(before) is not int or before < 0:
        raise DefinitionError(f"{FILE}: {name} has rows_before {before!r}; it may be 0 or more.")
    return Source(name, key, types[key], time, columns, terms, before)


def _parse(formula: object, where: str) -> ast.Expression:
    if not isinstance(formula, str):
        raise DefinitionError(f"{FILE}: {where} has the formula {formula!r}; it has to be a text.")
    try:
        return ast.parse(formula.strip(), FILE, "eval")
    except (SyntaxError, ValueError) as error:
        raise DefinitionError(f"{FILE}: {where} has {formula!r}, which is no expression: {error}.") from None


def names(formula: str) -> set[str]:
    """The names that a formula reads."""
    return {node.id for node in ast.walk(_parse(formula, "a formula")) if isinstance(node, ast.Name)}


def _check_names(source: Source, views: Sequence[View], module: bytes) -> None:
    features: dict[str, str] = {}
    for view in views:
        for feature in view.features:
            where = f"{view.name}.{feature.name}"
            if feature.name in (source.key, source.time):
                raise DefinitionError(f"{FILE}: {where} has the name of a key of {source.table}.")
            if feature.name == RUN:
                raise DefinitionError(f"{FILE}: {where} has the name of the column that says which run wrote a row.")
            if feature.name in features:
                raise DefinitionError(f"{FILE}: {where} and {features[feature.name]} have one name.")
            features[feature.name] = where
    formulas = {f"the term {name}": formula for name, formula in source.terms.items()}
    formulas |= {f"{view.name}.{feature.name}": feature.formula for view in views for feature in view.features}
    totals = {feature.name for view in views for feature in view.features if feature.running_total}
    known = {*source.columns, *source.terms, *features, *GIVEN, *_defined(module)}
    for where, formula in formulas.items():
        # A formula sees the newest rows only; a running total needs all, so it is known when everything else is.
        for name in sorted(names(formula) & totals - {*source.columns, *source.terms}):
            raise DefinitionError(f"{FILE}: {where} reads {name}, a running total, which no other formula may.")
        for name in sorted(names(formula) - known):
            if not hasattr(builtins, name):
                raise DefinitionError(
                    f"{FILE}: {where} has the formula {formula!r}, and {name} is no column of {source.table}, no term, "
                    "no feature of it, and not in formulas.py."
                )


def _defined(module: bytes) -> set[str]:
    """The names that formulas.py gives to formulas."""
    try:
        tree = ast.parse(module, "formulas.py")
    except (SyntaxError, ValueError) as error:
        raise DefinitionError(f"formulas.py is no Python: {error}.") from None
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found
