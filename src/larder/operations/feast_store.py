"""Feast, quietly: its store, with the standard output it writes to kept out of the journal."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from larder import feast_version
from larder.errors import ConfigError, LarderError
from larder.log import logger

if TYPE_CHECKING:
    from feast import FeatureStore


@contextmanager
def quiet() -> Iterator[None]:
    """What Feast prints goes to stderr at debug level, else nowhere; its progress bars only to a terminal.

    Raises ConfigError for a Feast that this package does not know.
    """
    feast_version.checked()
    debug = logger.isEnabledFor(10)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(sys.stderr if debug else nowhere),
        warnings.catch_warnings(),
    ):
        if not debug:
            warnings.simplefilter("ignore")
        yield


def open_store(feature_store_yaml: Path) -> "FeatureStore":
    from feast import FeatureStore

    try:
        return FeatureStore(fs_yaml_file=feature_store_yaml)
    except Exception as error:  # Feast's own message may quote the file, passwords included
        logger.debug("feature_store.yaml", exc_info=True)
        if type(error).__name__ in ("OperationalError", "ConnectionTimeout"):
            raise LarderError("The registry's database cannot be reached.") from None
        raise ConfigError(f"Feast cannot use {feature_store_yaml}: {type(error).__name__}.") from None


def batch_views(store: "FeatureStore") -> list[Any]:
    """The views whose online values come from their table alone. What a push source feeds is left to the push."""
    return [view for view in store.list_feature_views() if view.online and view.stream_source is None]
