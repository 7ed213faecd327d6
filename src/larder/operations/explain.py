"""`larder explain`: where a value comes from, from what is served back to the lines of the files.

The rows of computed views say which run wrote them, and the bars which load brought them (larder.features.definitions:
RUN, LOAD). Which bars a value was computed from is found by computing it again, from the newest bars that give it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from larder.errors import ConfigError, LarderError, reason
from larder.features import definitions, record
from larder.features.definitions import Feature, Source, View
from larder.features.formulas import Formulas
from larder.operations import feast_store
from larder.operations.credentials import Credentials
from larder.postgres import session

TOLERANCE = 1e-9  # relative, as for the formulas' own trial
# As JSON, because a table of one's own may not have the column.
NOTED = "(to_jsonb(source) ->> {column})::integer"
ROW = """
SELECT {time} AS time, {value} AS value, {noted} AS noted FROM {table} AS source
WHERE {key} = %s AND {time} <= %s ORDER BY {time} DESC{created} LIMIT 1
"""
BARS = """
SELECT {time} AS time, {noted} AS noted, {columns} FROM {table} AS source
WHERE {key} = %s AND {time} <= %s ORDER BY {time} DESC LIMIT %s
"""
RUN = "SELECT * FROM features.runs WHERE run_id = %s"
LOADS = "SELECT * FROM market_data.loads WHERE load_id = ANY(%s) ORDER BY load_id"


@dataclass
class Value:
    """A value, and the time of its row."""

    value: float | int | str | None
    event_timestamp: datetime


@dataclass
class Computed:
    """How a value was computed; `value` is what the bars, as they are now, give by the deployed definitions.

    The run wrote the row. A later one that computed the same value, even with other definitions, has left it alone.
    """

    formula: str
    description: str
    deployed: bool  # the run had the definitions that are deployed
    run: dict[str, Any] | None
    value: float | None
    source: str
    bars: list[dict[str, Any]]  # the oldest first
    loads: list[dict[str, Any]]


@dataclass
class Explanation:
    """What is known of a value; `problems` says what does not agree."""

    symbol: str
    feature: str
    served: Value | None = None
    table: str = ""
    row: Value | None = None
    computed: Computed | None = None
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(credentials: Credentials, repo: Path, symbol: str, feature: str, at: datetime | None) -> Explanation:
    """Explain what is served of a feature, or, with `at`, what a training set has of it at that time."""
    told = Explanation(symbol, feature)
    with session.connect(credentials.pipeline_url, "explain") as connection, feast_store.quiet():
        connection.row_factory = dict_row  # type: ignore[assignment]
        store = feast_store.open_store(credentials.feature_store)
        view, name = _feature(store, feature)
        key, entity = _entity(view, symbol)
        newest = _row(connection, view, name, key, entity, at)
        row = newest
        if at is None:
            told.served = _served(store, feature, key, entity)
            if told.served:
                row = _row(connection, view, name, key, entity, told.served.event_timestamp)
        told.table = view.batch_source.get_table_query_string()
        if row:
            told.row = Value(row["value"], row["time"])
        told.problems += _differences(told, newest, view, at)
        formulas = Formulas(repo)
        of = next((v for v in formulas.definitions.views if v.table == told.table), None)
        if of and row:
            told.computed = _computed(connection, formulas, of, name, entity, row)
            if not same(told.computed.value, row["value"]):
                told.problems.append(
                    f"The bars as they are now give {told.computed.value} by the deployed formula, and the row has "
                    f"{row['value']}: a bar or the formula changed, and the next run of the pipeline computes it."
                )
    return told


def _feature(store: Any, feature: str) -> tuple[Any, str]:
    view_name, _, name = feature.partition(":")
    views = {view.name: view for view in store.list_feature_views()}
    if view_name not in views:
        raise ConfigError(f"There is no view {view_name!r} that is stored; there are {', '.join(sorted(views))}.")
    names = [known.name for known in views[view_name].features]
    if name not in names:
        raise ConfigError(f"{view_name} has no feature {name!r}; it has {', '.join(names)}.")
    return views[view_name], name


def _entity(view: Any, symbol: str) -> tuple[str, str | int]:
    if len(view.join_keys) != 1:
        raise ConfigError(f"{view.name} has the keys {', '.join(view.join_keys)}; only views of one key are explained.")
    if not view.entity_columns[0].dtype.to_value_type().name.startswith("INT"):
        return view.join_keys[0], symbol
    try:
        return view.join_keys[0], int(symbol)
    except ValueError:
        raise ConfigError(f"{view.join_keys[0]} is {symbol!r}; it has to be a whole number.") from None


def _served(store: Any, feature: str, key: str, entity: str | int) -> Value | None:
    """What a client would be answered."""
    try:
        result = store.get_online_features([feature], [{key: entity}]).proto.results[-1]
    except Exception as error:
        raise LarderError(f"The online store cannot be read: {reason(error)}.") from error
    if not result.event_timestamps[0].seconds:
        return None
    value = result.values[0]
    kind = value.WhichOneof("val")
    return Value(getattr(value, kind) if kind else None, result.event_timestamps[0].ToDatetime(tzinfo=UTC))


def _row(
    connection: psycopg.Connection, view: Any, name: str, key: str, entity: str | int, at: datetime | None
) -> Mapping[str, Any] | None:
    """The newest row up to a time, or of all."""
    source = view.batch_source
    columns = {mapped: column for column, mapped in (source.field_mapping or {}).items()}
    table = source.get_table_query_string()
    created = source.created_timestamp_column
    query = sql.SQL(ROW).format(
        time=sql.Identifier(source.timestamp_field),
        value=sql.Identifier(columns.get(name, name)),
        noted=sql.SQL(NOTED).format(column=sql.Literal(definitions.RUN)),
        table=sql.SQL(table) if table.startswith("(") else session.identifier(table),
        key=sql.Identifier(columns.get(key, key)),
        created=sql.SQL(", {} DESC").format(sql.Identifier(created)) if created else sql.SQL(""),
    )
    found: Mapping[str, Any] | None = connection.execute(query, [entity, at or "infinity"]).fetchone()  # type: ignore[assignment]
    return found


def _differences(told: Explanation, newest: Mapping[str, Any] | None, view: Any, at: datetime | None) -> list[str]:
    """How what is served and what is stored differ."""
    if newest is None:
        until = f" up to {at:%Y-%m-%d %H:%M}" if at else ""
        return [f"{told.table} has no row of {told.symbol}{until}."]
    if at:
        if view.ttl and newest["time"] < at - view.ttl:
            return [f"The row is older than the view's ttl of {view.ttl.days} days: a training set has null."]
        return []
    if told.served is None:
        return ["The online store has nothing of it: larder materialize --since 2000-01-01 writes it."]
    found = []
    if told.served.event_timestamp < newest["time"]:
        found.append(f"The database has a newer row, of {newest['time']:%Y-%m-%d %H:%M}: larder materialize writes it.")
    if told.row is None or told.row.event_timestamp != told.served.event_timestamp:
        found.append("The row that is served is no longer in the database.")
    elif not same(told.served.value, told.row.value):
        found.append("The row has another value than what is served: larder materialize writes it.")
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)


def _computed(
    connection: psycopg.Connection,
    formulas: Formulas,
    view: View,
    name: str,
    entity: str | int,
    row: Mapping[str, Any],
) -> Computed:
    feature = next(feature for feature in view.features if feature.name == name)
    source = formulas.definitions.sources[view.source]
    query = sql.SQL(BARS).format(
        time=sql.Identifier(source.time),
        noted=sql.SQL(NOTED).format(column=sql.Literal(definitions.LOAD)),
        columns=sql.SQL(", ").join(map(sql.Identifier, source.columns)),
        table=session.identifier(source.table),
        key=sql.Identifier(source.key),
    )
    most = None if feature.running_total else source.rows_before + 1
    bars: list[Any] = connection.execute(query, [entity, row["time"], most]).fetchall()[::-1]
    value, needed = _again(formulas, source, view, feature, bars)
    bars = bars[len(bars) - needed :]
    loads: list[Any] = []
    if noted := sorted({bar["noted"] for bar in bars if bar["noted"]}):
        loads = connection.execute(LOADS, [noted]).fetchall()
    run: Any = connection.execute(RUN, [row["noted"]]).fetchone()
    return Computed(
        formula=feature.formula,
        description=feature.description,
        deployed=bool(run) and run["fingerprint"] == record.fingerprint(formulas),
        run=run,
        value=value,
        source=source.table,
        bars=[
            {source.time: bar["time"], **{c: bar[c] for c in source.columns}, definitions.LOAD: bar["noted"]}
            for bar in bars
        ],
        loads=loads,
    )


def _again(
    formulas: Formulas, source: Source, view: View, feature: Feature, bars: Sequence[Mapping[str, Any]]
) -> tuple[float | None, int]:
    """What the bars give for the newest one, and how many of the newest suffice: all of them for a total or a null."""

    def value(count: int) -> float:
        columns = {c: [bar[c] for bar in bars[len(bars) - count :]] for c in source.columns}
        return float(formulas.of(source, columns).features(view)[feature.name][-1])

    if not bars:
        return None, 0
    whole = value(len(bars))
    if math.isnan(whole):
        return None, len(bars)
    if feature.running_total:
        return whole, len(bars)
    few, enough = 0, 1
    while enough < len(bars) and not same(value(enough), whole):
        few, enough = enough, min(2 * enough, len(bars))
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if same(value(middle), whole) else (middle, enough)
    return whole, enough


def as_text(told: Explanation) -> str:
    def of(value: Value | None, nothing: str) -> str:
        return f"{value.value}, of {value.event_timestamp:%Y-%m-%d %H:%M} UTC" if value else nothing

    lines = [f"{told.symbol} {told.feature}"]
    if told.served or told.row is None:
        lines.append(f"served      {of(told.served, 'nothing')}")
    lines.append(f"row         {of(told.row, 'none')}, in {told.table}")
    if computed := told.computed:
        lines.append(f"formula     {computed.formula}" + (f" ({computed.description})" if computed.description else ""))
        lines.append(f"computed    {_by('run', definitions.RUN, 'began_at', computed.run)}")
        if computed.run:
            deployed = "deployed" if computed.deployed else "no longer deployed"
            lines.append(f"definitions {computed.run['fingerprint'][:12]}, {deployed}")
        bars = computed.bars
        if bars:
            time = next(iter(bars[0]))
            span = f"{bars[0][time]:%Y-%m-%d} to {bars[-1][time]:%Y-%m-%d}"
            lines.append(f"bars        {len(bars)} of {computed.source}, {span}, which give {computed.value}")
            for load in [*computed.loads, None]:
                own = [bar[time] for bar in bars if bar[definitions.LOAD] == (load and load[definitions.LOAD])]
                if own:
                    lines += _of_load(own, load)
    return "\n".join([*lines, *(f"- {problem}" for problem in told.problems)])


def _by(what: str, number: str, time: str, noted: Mapping[str, Any] | None) -> str:
    if noted is None:
        return f"by a {what} from before they were noted"
    journal = f", journalctl _SYSTEMD_INVOCATION_ID={noted['invocation']}" if noted["invocation"] else ""
    when = f"{noted[time]:%Y-%m-%d %H:%M} UTC"
    return f"by {what} {noted[number]} of {when} on {noted['host']}, code {noted['code']}{journal}"


def _of_load(times: Sequence[datetime], load: Mapping[str, Any] | None) -> list[str]:
    span = f"{min(times):%Y-%m-%d} to {max(times):%Y-%m-%d}" if len(times) > 1 else f"{times[0]:%Y-%m-%d}"
    told = f"  {len(times)} ({span}) {_by('load', definitions.LOAD, 'loaded_at', load)}"
    return [told, f"    {load['path']} ({load['format']}, sha256 {load['sha256']})"] if load else [told]
