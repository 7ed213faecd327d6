"""Numbers as they are written in files: decimal marks, thousands, currencies, K and M."""
# ruff: noqa: RUF001 -- dashes, minus signs and apostrophes as files have them

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from larder.bars.model import CURRENCIES

CURRENCY = rf"(?:\p{{Sc}}|Rs\.?|{CURRENCIES})"
Floats = npt.NDArray[np.float64]
# What stands where there is no value.
NOTHING = [
    "",
    "-",
    "--",
    "---",
    "—",
    "–",
    ".",
    "NA",
    "N/A",
    "n/a",
    "#N/A",
    "NaN",
    "nan",
    "null",
    "NULL",
    "None",
    "none",
    "NONE",
    "nil",
]
LONGEST = 64
ENOUGH = 1000  # so many numbers with a point show that it is the decimal mark
SPACES = " '’\u00a0\u2009\u202f"  # between thousands: French, Swiss
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _pattern(decimal: str, thousands: str) -> str:
    d, t = re.escape(decimal), rf"[{re.escape(thousands)}{SPACES}]"
    # The last group has three digits; those before it two or three, as in India.
    return rf"^[+-]?(?:\d+|\d{{1,3}}(?:{t}\d{{2,3}})*{t}\d{{3}})?(?:{d}\d*)?(?:[eE][+-]?\d{{1,3}})?$"


STYLES = {".": _pattern(".", ","), ",": _pattern(",", ".")}
# Values that can be read in one way only.
SURE = {
    mark: rf"^[+-]?(?:\d*{m}\d{{1,2}}|\d*{m}\d{{4,}}|\d{{4,}}{m}\d{{3}}|0?{m}\d+|[\d{t}]*{t}\d{{3}}{m}\d*"
    rf"|\d{{1,3}}(?:{t}\d{{2,3}})*{t}\d{{2,3}}{t}\d{{3}})(?:[eE][+-]?\d+)?$"
    for mark, m, t in ((".", r"\.", ","), (",", ",", r"\."))
}
# "108'165" is a Swiss 108,165, or 108 and 16.5 thirty-seconds.
TREASURY = r"^\d{2,3}'(?:[0-2]\d|3[01])[0257]$"
# "1,234" and "1.234" can be read in two ways.
OPEN = r"^[+-]?\d{1,3},\d{3}$"
OPEN_POINT = r"^[+-]?[1-9]\d{0,2}\.\d{3}$"


@dataclass
class Marks:
    """What the numbers of a file say of their decimal mark: values that show it, and values that leave it open."""

    point: int = 0
    comma: int = 0
    open_comma: int = 0
    open_point: int = 0
    apostrophes: int = 0
    treasury: int = 0  # of these, how many may be thirty-seconds
    example: str = ""

    def note(self, column: pa.Array) -> None:
        if not _is_text(column):
            return
        if _castable(column):
            if self.point < ENOUGH:
                self.point += _count(column, SURE["."])
                self.open_point += self._note_open(column, OPEN_POINT)
            return
        self.apostrophes += _count(column, "'")
        self.treasury += _count(pc.utf8_trim_whitespace(column), TREASURY)
        text = _bare(column)
        self.point += _count(text, SURE["."])
        self.comma += _count(text, SURE[","])
        self.open_comma += self._note_open(text, OPEN)
        self.open_point += self._note_open(text, OPEN_POINT)

    def _note_open(self, text: pa.Array, pattern: str) -> int:
        found = pc.match_substring_regex(text, pattern)
        count = int(pc.sum(found).as_py() or 0)
        if count and not self.example:
            self.example = text.filter(found)[0].as_py()
        return count

    def decimal(self, share: float, *, points: bool = False) -> tuple[str | None, str]:
        """The mark, or None and why it is not known. `points`: a point may well stand between thousands."""
        low, high = sorted((self.point, self.comma))
        if low and low > share * (low + high):
            return None, f"some numbers have a decimal point ({self.point}), some a decimal comma ({self.comma})"
        if high:
            return ("," if self.comma > self.point else "."), ""
        if self.open_comma:
            return None, f"{self.example} can be read with a decimal comma and with a comma between thousands"
        if self.open_point and points:
            return None, f"{self.example} can be read with a decimal point and with a point between thousands"
        return ".", ""


def _is_text(column: pa.Array) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _bare(column: pa.Array) -> pa.Array:
    """Text without blanks, apostrophes, currencies and units."""
    text = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), rf"[{SPACES}]", "")
    return pc.replace_substring_regex(text, rf"^([+-]?){CURRENCY}|(?:{CURRENCY}|[KMBTkmbt])$", r"\1")


def _castable(text: pa.Array) -> bool:
    try:
        text.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _count(text: pa.Array, pattern: str) -> int:
    return int(pc.sum(pc.match_substring_regex(text, pattern)).as_py() or 0)


def parse(column: pa.Array, decimal: str, *, units: bool = False) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """float64, NaN for whatever is not a finite number; and where there is nothing at all.

    With `units`, K, M, B and T multiply.
    """
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan), np.ones(len(column), bool)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not _is_text(column):
        nothing = np.asarray(column.is_null()).astype(bool)
        values = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)
        if pa.types.is_floating(column.type):  # pandas has NaN for nothing
            nothing = nothing | np.isnan(values)
        return values, nothing
    text = pc.utf8_trim_whitespace(column)
    nothing = np.asarray(pc.is_in(text, value_set=pa.array([*NOTHING, None], pa.string()))).astype(bool)
    if nothing.any():
        text = pc.if_else(pa.array(nothing), None, text)
    if decimal == ".":
        try:
            return _floats(text.cast(pa.float64())), nothing
        except pa.ArrowInvalid:
            pass
    text = pc.if_else(pc.greater(pc.utf8_length(text), LONGEST), None, text)
    text = pc.replace_substring_regex(text, rf"^([+-]?)\s*{CURRENCY}\s*|\s*{CURRENCY}$", r"\1")
    text = pc.replace_substring(text, "−", "-")
    factor = np.ones(len(text))
    if units:
        unit = pc.utf8_upper(pc.utf8_slice_codeunits(text, -1))
        for letter, value in UNITS.items():
            factor[np.asarray(pc.fill_null(pc.equal(unit, letter), False)).astype(bool)] = value
        text = pc.replace_substring_regex(text, r"\s*[KMBTkmbt]$", "")
    fits = pc.and_(pc.match_substring_regex(text, STYLES[decimal]), pc.match_substring_regex(text, r"\d"))
    text = pc.if_else(fits, text, None)
    thousands = "," if decimal == "." else "."
    text = pc.replace_substring_regex(text, rf"[{re.escape(thousands)}{SPACES}]", "")
    if decimal == ",":
        text = pc.replace_substring(text, ",", ".")
    return _floats(text.cast(pa.float64())) * factor, nothing


def _floats(column: pa.Array) -> Floats:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
