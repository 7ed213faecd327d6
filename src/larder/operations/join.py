"""`larder join`: the point-in-time join of a Parquet file of entity rows, into a directory of Parquet files.

Some rows are joined at a time, so that memory stays bounded however many there are. A part is written under another
name and then renamed: each part in the directory is whole, and a run that was ended goes on with the others.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from larder.errors import ConfigError
from larder.log import event
from larder.operations import feast_store

# Readers of a directory of Parquet files leave out names that begin with _ or a full stop.
REQUEST = "_request.json"


def join(feature_store: Path, entities: Path, directory: Path, features: Sequence[str], *, rows_at_once: int) -> None:
    """Write part-00000.parquet, … of `rows_at_once` rows each, in the order of the entity rows.

    `features` are view:feature, or the name of one feature service. Raises ConfigError where the entity rows or the
    features cannot be joined, or where the directory has the parts of another request.
    """
    try:
        file = pq.ParquetFile(entities, pre_buffer=False)  # a buffer would keep all that was read
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{entities} is not a Parquet file: {error}") from error
    _begin(directory, entities, features, rows_at_once)
    total, done, joined, started = file.metadata.num_rows, 0, 0, monotonic()
    with feast_store.quiet():
        store = feast_store.open_store(feature_store)
        service = len(features) == 1 and ":" not in features[0]
        wanted = store.get_feature_service(features[0]) if service else [*features]
        for number, rows in enumerate(file.iter_batches(rows_at_once)):
            part = directory / f"part-{number:05}.parquet"
            done += rows.num_rows
            if part.exists():
                continue
            # As Arrow's types: pandas' own would depend on whether a part has nulls.
            frame = pa.table(rows).to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
            try:
                table = store.get_historical_features(frame, wanted).to_arrow()
            except (ValueError, TypeError) as error:
                raise ConfigError(str(error)) from error
            unfinished = directory / f".{part.name}"
            pq.write_table(table, unfinished)
            unfinished.replace(part)
            joined += rows.num_rows
            rate = joined / (monotonic() - started)
            event("joined", rows=done, of=total, rows_per_s=round(rate), seconds_left=round((total - done) / rate))


def _begin(directory: Path, entities: Path, features: Sequence[str], rows_at_once: int) -> None:
    """Note in the directory what its parts are of."""
    with entities.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    request = {"entities": digest, "features": [*features], "rows_at_once": rows_at_once}
    directory.mkdir(parents=True, exist_ok=True)
    noted = directory / REQUEST
    if noted.exists() and (found := json.loads(noted.read_text())) != request:
        differ = ", ".join(name for name, value in request.items() if found.get(name) != value)
        raise ConfigError(f"{directory} has parts of another join ({differ} differ): name an empty directory.")
    noted.write_text(json.dumps(request, indent=2) + "\n")
