"""Formulas of computed_views.yml, worked out for the rows of one key, oldest first."""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from larder.errors import ConfigError
from larder.features import definitions
from larder.features.definitions import Definitions, Feature, Source, View

Array = npt.NDArray[np.float64]

# The prices that indicators are computed from: as loaded, or all of a bar's scaled by adjusted_close / close.
PRICES = ("close", "adjusted_close")
# The rows of which a repository's formulas are tried.
TRIED = 300


class FormulaError(Exception):
    """A formula cannot be worked out for some rows."""


def prices() -> str:
    """Which prices LARDER_INDICATOR_PRICES names."""
    name = os.environ.get("LARDER_INDICATOR_PRICES", PRICES[0])
    if name not in PRICES:
        raise ConfigError(f"LARDER_INDICATOR_PRICES is {name!r}; it may be {' or '.join(PRICES)}.")
    return name


class Formulas:
    """The formulas of a repository, compiled."""

    def __init__(self, repository: Path, indicator_prices: str | None = None) -> None:
        """Read computed_views.yml and formulas.py. Raises ConfigError, in one sentence."""
        try:
            self.definitions: Definitions = definitions.read(repository)
        except definitions.DefinitionError as error:
            raise ConfigError(str(error)) from None
        self.prices = indicator_prices or prices()
        self.functions = _module(repository / "formulas.py")
        self.code: dict[str, dict[str, CodeType]] = {
            source.table: {
                name: compile(formula.strip(), f"{definitions.FILE}: {name}", "eval")
                for name, formula in (
                    *((f.name, f.formula) for view in self.definitions.views_of(source) for f in view.features),
                    *((f"term {name}", formula) for name, formula in source.terms.items()),
                )
            }
            for source in self.definitions.sources.values()
        }

    def of(self, source: Source, columns: Mapping[str, npt.ArrayLike]) -> "Rows":
        """The rows of one key of a source: its columns, oldest row first."""
        return Rows(self, source, columns)

    def try_out(self) -> None:
        """Raise ConfigError where a formula fails, gives not one value per row, or reads rows that it may not."""
        for source in self.definitions.sources.values():
            try:
                self._reads_no_later_rows(source)
                self._reads_no_older_rows(source)
            except FormulaError as error:
                raise ConfigError(f"{definitions.FILE}: {error}") from error

    def _reads_no_later_rows(self, source: Source) -> None:
        columns = _walk(source, 2 * TRIED)
        for name, whole, part in self._both(source, columns, {name: v[:TRIED] for name, v in columns.items()}):
            if not np.array_equal(whole[:TRIED], part, equal_nan=True):
                raise FormulaError(
                    f"{name} looks ahead: its values change when later rows are there, so training would know the "
                    "future."
                )

    def _reads_no_older_rows(self, source: Source) -> None:
        newest = slice(-source.rows_before - TRIED, None)
        for scale in (0.01, 100):
            columns = _walk(source, source.rows_before + 2 * TRIED)
            for values in columns.values():
                values[:TRIED] *= scale
            for name, whole, part in self._both(source, columns, {name: v[newest] for name, v in columns.items()}):
                if not np.allclose(whole[-TRIED:], part[-TRIED:], rtol=1e-9, atol=1e-9, equal_nan=True):
                    raise FormulaError(
                        f"{name} reads more than the {source.rows_before} rows before a row: raise rows_before of "
                        f"{source.table}, or make it a running_total."
                    )

    def _both(
        self, source: Source, whole: Mapping[str, Array], part: Mapping[str, Array]
    ) -> Iterator[tuple[str, Array, Array]]:
        """Every feature but running totals, of more rows and of fewer."""
        more, fewer = self.of(source, whole), self.of(source, part)
        for view in self.definitions.views_of(source):
            of_more, of_fewer = more.features(view), fewer.features(view)
            for feature in view.features:
                if not feature.running_total:
                    yield f"{view.name}.{feature.name}", of_more[feature.name], of_fewer[feature.name]


def _walk(source: Source, rows: int) -> dict[str, Array]:
    """Columns to try formulas with: positive, and no two rows alike."""
    random = np.random.default_rng(1)
    return {name: 100 * np.exp(random.normal(0, 0.01, rows).cumsum()) for name in source.columns}


class Rows(dict[str, Any]):
    """What formulas read by name: terms and features, worked out on first use, and the columns of the source."""

    def __init__(self, formulas: Formulas, source: Source, columns: Mapping[str, npt.ArrayLike]) -> None:
        super().__init__(indicator_prices=formulas.prices)
        self.formulas, self.source = formulas, source
        self.code = formulas.code[source.table]
        self.columns = {name: np.ascontiguousarray(columns[name], dtype=np.float64) for name in source.columns}
        self["as_loaded"] = SimpleNamespace(**self.columns)
        self.length = len(next(iter(self.columns.values()), ()))
        self.under_way: list[str] = []

    def __missing__(self, name: str) -> Any:
        """A term comes before a column, which comes before a feature of the same name."""
        if name in self.source.terms:
            value = self._worked_out(f"term {name}")
        elif name in self.columns:
            value = self.columns[name]
        elif name in self.code:
            value = self.worked_out(name)
        else:
            raise KeyError(name)  # a function of formulas.py, or one of Python's own
        self[name] = value
        return value

    def _worked_out(self, name: str) -> Any:
        if name in self.under_way:
            circle = " -> ".join([*self.under_way[self.under_way.index(name) :], name])
            raise FormulaError(f"{circle} is defined by itself.")
        self.under_way.append(name)
        try:
            # The formulas are code of the repository, as formulas.py is.
            return eval(self.code[name], self.formulas.functions, self)  # noqa: S307
        except FormulaError:
            raise
        except Exception as error:
            raise FormulaError(f"{name} cannot be computed: {type(error).__name__}: {error}.") from error
        finally:
            self.under_way.pop()

    def worked_out(self, name: str) -> Array:
        """What a feature's formula gives: one float64 per row."""
        with np.errstate(all="ignore"):
            values = np.asarray(self._worked_out(name))
        if values.shape != (self.length,) or values.dtype.kind not in "bif":
            raise FormulaError(
                f"{name} gives {values.dtype} of shape {values.shape}; it has to give one number for each of "
                f"{self.length} rows."
            )
        return values.astype(np.float64)

    def steps(self, feature: Feature) -> Array:
        """What each row adds to a running total; NaN where that is not known."""
        return self.worked_out(feature.name)

    def features(self, view: View) -> dict[str, Array]:
        """The features of one view for each row; NaN (never an infinity) where there is no value."""
        results = {}
        for feature in view.features:
            values = running_total(self.steps(feature)) if feature.running_total else self._value(feature)
            results[feature.name] = np.where(np.isfinite(values), values, np.nan)
        return results

    def _value(self, feature: Feature) -> Array:
        # The cached one, unless the name is that of a column or a term in formulas.
        named = feature.name in self.source.terms or feature.name in self.columns
        return self.worked_out(feature.name) if named else self[feature.name]


def running_total(steps: Array, before: float = 0.0) -> Array:
    """The sum of all steps up to each one, added in their order to `before`; NaN, and nothing added, at a NaN."""
    known = np.isfinite(steps)
    sums = np.cumsum(np.concatenate(([before], np.where(known, steps, 0.0))))[1:]
    return np.where(known, sums, np.nan)


def _module(path: Path) -> dict[str, Any]:
    """The names that formulas.py defines."""
    if not path.exists():
        return {"np": np}
    spec = spec_from_file_location("larder_repository_formulas", path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.dont_write_bytecode = True  # the repository may be read-only
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    return vars(module)
