"""What a file is made of: sheets of text or Parquet, out of archives, whatever the file is called."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import unquote

from larder.errors import RefusedFileError


class NoTableError(RefusedFileError):
    """What cannot hold bars at all: beside tables in an archive, it is passed over."""


SAMPLE = 1 << 18
LARGEST = 16 << 30  # unpacked: an archive may hold more than any disk
MEMBERS = 100_000
BOOKKEEPING = {"_SUCCESS", "_metadata", "_common_metadata"}
ENDING = re.compile(r"\.(?:csv|txt|tsv|tab|prn|dat|parquet|parq|pq|gz|gzip|bz2|xz|zip|zst)$", re.IGNORECASE)
# What browsers and file managers add to the name of a second copy.
COPY = re.compile(r"\s*(?:\(\d{1,3}\)| - (?:Copy|Kopie|copia)(?: \(\d+\))?| copy(?: \d+)?)$", re.IGNORECASE)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
# Files that hold no table of text: what they are, and what to do.
OTHERS = {
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls): save it as CSV",
    b"%PDF": "a PDF",
    b"ARROW1": "an Arrow file (Feather): write it as Parquet",
    b"\x89HDF": "an HDF5 file: write it as Parquet",
    b"SQLite format 3": "an SQLite database: write its table as CSV",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it, or pack it with gzip, bzip2, xz or zip",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it, or pack it with zip",
    b"Rar!": "a RAR archive: unpack it, or pack it with zip",
    b"\x80\x04": "a pickle, which may run programs: write it as CSV or Parquet",
    b"\x80\x05": "a pickle, which may run programs: write it as CSV or Parquet",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x7fELF": "a program",
}


@dataclass(frozen=True)
class Sheet:
    """One table: a file, or a member of an archive. `name` is what its symbol may come from."""

    path: Path
    name: str
    compression: str | None
    member: str | None = None
    parquet: bool = False
    sample: bytes = b""

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The unpacked bytes from the first one on."""
        with _unpacked(self.path, self.compression, self.member) as stream:
            yield stream


@dataclass
class Source:
    """The sheets of a file. `partitions` are what the folders of a data set say: symbol=AAPL."""

    path: Path
    compression: str | None
    sheets: list[Sheet]
    passed_over: list[str] = field(default_factory=list)
    partitions: dict[str, str] = field(default_factory=dict)


def stem(name: str) -> str:
    """A file's name without its endings and without what marks a copy: "AAPL (1).csv.gz" → AAPL."""
    name = PurePosixPath(name).name
    while True:
        shorter = COPY.sub("", ENDING.sub("", name))
        if shorter == name or not shorter:
            return name
        name = shorter


def open_source(path: Path) -> Source:
    """Look into a file; RefusedFileError where it holds no table."""
    with path.open("rb") as file:
        start = file.read(64)
    partitions = {
        key.lower(): unquote(value) for key, _, value in (part.partition("=") for part in path.parent.parts) if value
    }
    if not start:
        raise RefusedFileError("the file is empty.")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        sheets, passed_over = _members(path)
        return Source(path, "zip", sheets, passed_over, partitions)
    if start.startswith(b"PAR1"):
        return Source(path, None, [Sheet(path, path.name, None, parquet=True)], [], partitions)
    compression = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
    return Source(path, compression, [_sheet(path, path.name, compression, None)], [], partitions)


def _members(path: Path) -> tuple[list[Sheet], list[str]]:
    """The tables of an archive, and what is said of members that are none."""
    with zipfile.ZipFile(path) as archive:
        infos = [i for i in archive.infolist() if not i.is_dir()]
    names = {info.filename for info in infos}
    if "[Content_Types].xml" in names:
        raise RefusedFileError("the file is an Excel workbook (.xlsx) or another Office document: save it as CSV.")
    parts = [i for i in infos if not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(i.filename).parts)]
    if not parts:
        raise RefusedFileError("the archive holds no file.")
    if len(parts) > MEMBERS:
        raise RefusedFileError(f"the archive holds {len(parts)} files; {MEMBERS} are allowed.")
    sheets: list[Sheet] = []
    passed_over: list[str] = []
    for info in parts:
        if info.flag_bits & 1:
            raise RefusedFileError(f"{info.filename} in the archive is encrypted: unpack it with its password.")
        if info.compress_type not in METHODS:
            raise RefusedFileError(
                f"{info.filename} in the archive is packed by a method that is not usual: unpack it."
            )
        try:
            sheets.append(_sheet(path, info.filename, "zip", info.filename))
        except NoTableError as error:
            passed_over.append(error.message)
    if not sheets:
        raise RefusedFileError(passed_over[0])
    return sheets, passed_over


def _sheet(path: Path, name: str, compression: str | None, member: str | None) -> Sheet:
    with _unpacked(path, compression, member) as stream:
        sample = stream.read(SAMPLE)
    where = f"{member} in the archive" if member else "the file"
    if not sample.strip():
        raise NoTableError(f"{where} is empty.")
    if sample.startswith((b"PAR1", b"PK\x03\x04", *PACKED)):
        raise RefusedFileError(f"{where} is packed twice: unpack it.")
    if len(sample) > 262 and sample[257:262] == b"ustar":
        raise RefusedFileError(f"{where} is a tar archive: unpack it, or pack it with zip.")
    for magic, what in OTHERS.items():
        if sample.startswith(magic):
            raise NoTableError(f"{where} is {what}.")
    return Sheet(path, name, compression, member, sample=sample)


@contextmanager
def _unpacked(path: Path, compression: str | None, member: str | None) -> Iterator[IO[bytes]]:
    if member is not None:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            yield _bounded(stream)
        return
    openers: dict[str | None, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, None: open}
    with openers[compression](path, "rb") as stream:
        yield stream if compression is None else _bounded(stream)


def _bounded(stream: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], _Bounded(stream))


class _Bounded(io.RawIOBase):
    """Reads no more than LARGEST bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self.stream = stream
        self.left = LARGEST

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise RefusedFileError(f"the archive holds more than {LARGEST >> 30} GiB.")
        return data


def encodings(sample: bytes) -> list[str]:
    """The encodings that the bytes may be in, the likeliest first; [] where they are no text."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),  # pyarrow leaves the mark out
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if sample.startswith(mark):
            return [name] if decode(sample, name) is not None else []
    if b"\0" in sample:
        even, odd = sample[0:4096:2].count(0), sample[1:4096:2].count(0)
        half = len(sample[:4096]) // 2
        if odd > half * 0.7 and even < half * 0.1:
            return ["utf-16-le"]
        if even > half * 0.7 and odd < half * 0.1:
            return ["utf-16-be"]
        return []
    if decode(sample, "utf-8") is not None:
        return ["utf-8"]
    from charset_normalizer import from_bytes

    best = from_bytes(sample[: 1 << 14]).best()
    likely = [codecs.lookup(best.encoding).name] if best and not best.encoding.startswith("utf") else []
    # Those that have a letter for nearly every byte are tried as well: a wrong one shows no column that is known.
    others = ("cp1252", "cp1250", "gb18030", "cp932", "big5", "cp949", "cp1251")
    return [e for e in dict.fromkeys([*likely, *others]) if decode(sample, e) is not None]


def decode(sample: bytes, encoding: str) -> str | None:
    """The text of a sample, whose last character may be cut; None where it is not of the encoding."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample, final=False)
    except UnicodeError:
        return None
    return None if "\0" in text else text.removeprefix("\ufeff")


def candidates(directory: Path) -> Iterator[Path]:
    """Every entry below an incoming folder that has to be loaded, or refused by name.

    Names that begin with a dot are left alone: rsync and others write such a file until it is whole.
    """

    def failed(error: OSError) -> None:
        unreadable.append(Path(str(error.filename)))

    unreadable: list[Path] = []
    for folder, folders, names in os.walk(directory, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # What writers of Parquet data sets leave for other programs holds no bars. Links to folders are not followed.
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted({*names, *links} - BOOKKEEPING):
            if not name.startswith("."):
                yield Path(folder, name)
        yield from unreadable
        unreadable.clear()
    yield from unreadable
