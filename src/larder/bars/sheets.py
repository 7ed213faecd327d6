"""The rows of a sheet, as they are written: columns by field, in batches; of a wide sheet symbol by symbol."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from larder.bars.recognise import Layout
from larder.bars.source import Sheet
from larder.errors import RefusedFileError

BATCH_BYTES = 1 << 20  # pyarrow reads several ahead
BATCH_ROWS = 1 << 16
BROKEN_LINES = 1000  # so many are kept as examples; all are counted
REMARKS = 10  # so many lines of a file may be no bars: titles, sources, totals


@dataclass
class Broken:
    """Lines of too few or too many columns; a few without any separator, which do not begin as a bar, are remarks."""

    count: int = 0
    remarks: int = 0
    lines: list[str] = field(default_factory=list)

    def __call__(self, row: pa.csv.InvalidRow) -> str:
        text = row.text or ""
        if row.actual_columns == 1 and not text.lstrip("\"' ")[:1].isdigit() and self.remarks < REMARKS:
            self.remarks += 1
            return "skip"
        # A quotation mark without its second one makes one line of many.
        self.count += 1 + text.strip().count("\n")
        if len(self.lines) < BROKEN_LINES:
            self.lines.append(text[:1000])
        return "skip"


@dataclass(frozen=True)
class Rows:
    """Some rows: of each field its column, of the volume all that it may stand in; the symbol of a wide sheet."""

    columns: Mapping[str, pa.Array]
    volumes: tuple[pa.Array, ...]
    extra: Mapping[str, pa.Array]
    symbol: str | None
    count: int


def rows(sheet: Sheet, layout: Layout, broken: Broken) -> Iterator[Rows]:
    """Every row of a sheet."""
    extra = {name: n for name in _extra(layout) if (n := _place(layout, name)) is not None}
    sides = layout.wide or {"": layout.columns}
    wanted = {n for columns in (layout.columns, *sides.values()) for places in columns.values() for n in places}
    for batch in _batches(sheet, layout, sorted(wanted | set(extra.values())), broken):
        for symbol, own in sides.items():
            columns = {**layout.columns, **own}
            yield Rows(
                {name: batch[str(places[0])] for name, places in columns.items() if name != "volume"},
                tuple(batch[str(n)] for n in columns.get("volume", ())),
                {name: batch[str(n)] for name, n in extra.items()},
                symbol or None,
                batch.num_rows,
            )


def _extra(layout: Layout) -> list[str]:
    """The columns that say which rows count."""
    return [*layout.format.only, *([layout.format.period["column"]] if layout.format.period else [])]


def _place(layout: Layout, name: str) -> int | None:
    names = [cell.strip().casefold() for cell in layout.header]
    return names.index(name.casefold()) if name.casefold() in names else None


def _batches(sheet: Sheet, layout: Layout, wanted: list[int], broken: Broken) -> Iterator[pa.RecordBatch]:
    """Columns by their numbers."""
    if sheet.parquet:
        yield from _parquet(sheet, layout, wanted)
        return
    with sheet.open() as stream:
        yield from pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(
                block_size=BATCH_BYTES,
                column_names=[str(n) for n in range(layout.width)],
                skip_rows=layout.skip,
                encoding="utf8" if layout.encoding == "utf-8" else layout.encoding,
            ),
            parse_options=pa.csv.ParseOptions(delimiter=layout.delimiter, invalid_row_handler=broken),
            # All as text, so that one bad value costs its own bar and not the file.
            convert_options=pa.csv.ConvertOptions(
                include_columns=[str(n) for n in wanted], column_types={str(n): pa.string() for n in wanted}
            ),
        )


def _parquet(sheet: Sheet, layout: Layout, wanted: list[int]) -> Iterator[pa.RecordBatch]:
    names = [layout.header[n] for n in wanted]
    for name in names:
        if layout.header.count(name) > 1:
            raise RefusedFileError(f"the column {name} stands in it twice; one is allowed.")
    with pa.parquet.ParquetFile(sheet.path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            found = batch.select(names)
            for column in found.schema:
                if pa.types.is_nested(column.type):
                    raise RefusedFileError(
                        f"its column {column.name} holds {column.type}; one value per row is allowed."
                    )
            yield pa.RecordBatch.from_arrays([_flat(column) for column in found.columns], [str(n) for n in wanted])


def _flat(column: pa.Array) -> pa.Array:
    """A column without dictionary, and text as plain strings."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if (
        pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ):
        return column.cast(pa.string())
    return column.cast(pa.string()) if pa.types.is_null(kind) else column
