"""Files that were damaged: whatever they hold, they end no run, and no bar is taken that the sample did not hold.

LARDER_FUZZ names how many are made of each sample; a day has time for some, a night for thousands.
"""

import gzip
import os
import random
import zipfile
from datetime import date
from pathlib import Path

import pytest

from larder.bars import Options, read
from larder.errors import RefusedFileError

SAMPLES = sorted(path for path in Path(__file__).with_name("samples").glob("*/*"))
ROUNDS = int(os.environ.get("LARDER_FUZZ", "8"))
JUNK = (
    "\0",
    "\ud7ff",
    "é",
    "\u202e",
    '"',
    "'",
    "\r",
    "\n",
    "\t",
    ";",
    ",",
    "x",
    "-",
    "=",
    "\x1b[2J",
    "$$",
    "NaN",
    "inf",
    "\ufeff",
    "#",
)


def bars(path):
    """Of each symbol and day, the bar."""
    taken = {}
    for batch in read(path, Options(last_day=date(2024, 12, 31))):
        for bar in batch.good.to_pylist():
            key = bar["symbol"], bar["event_timestamp"]
            assert key not in taken
            taken[key] = tuple(bar[name] for name in ("open", "high", "low", "close", "adjusted_close", "volume"))
    return taken


def taken_of(path):
    """The bars that are taken of a file; none where it is refused, by its name."""
    try:
        return bars(path)
    except RefusedFileError as error:
        if path.name not in error.message:
            raise AssertionError(error.message) from error
        return {}


def unpacked(path):
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    return data


def damaged(data, dice):
    """The lines of a file, damaged so that every bar that can be read is one of the sample's."""
    encoding = "utf-16" if data.startswith(b"\xff\xfe") else "cp1252" if b"\xf6" in data else "utf-8"
    lines = data.decode(encoding).replace("\r\n", "\n").split("\n")
    for _ in range(dice.randint(1, 4)):
        n = dice.randrange(len(lines))
        line = lines[n]
        match dice.randrange(9):
            case 0:
                del lines[n]
            case 1:
                lines.insert(dice.randrange(len(lines) + 1), line)
            case 2:
                m = dice.randrange(len(lines))
                lines[n], lines[m] = lines[m], lines[n]
            case 3:  # something that is no digit, anywhere
                at = dice.randrange(len(line) + 1)
                lines[n] = line[:at] + dice.choice(JUNK).strip("\r\n") + line[at:]  # half a number is one, too
            case 4:
                lines.insert(n, "".join(dice.choice(JUNK) for _ in range(dice.randint(1, 200))))
            case 5:  # a cell that is lost
                cells = line.split(",")
                del cells[dice.randrange(len(cells))]
                lines[n] = ",".join(cells)
            case 6:
                lines[n] = line + dice.choice(JUNK) * dice.randint(1, 20)
            case 7:
                lines = lines[:n]
            case 8:
                lines[n] = ""
        lines = lines or [""]
    text = dice.choice(["\n", "\r\n", "\r"]).join(lines)
    made = text.encode(dice.choice([encoding, encoding, "utf-8", "utf-16", "utf-16-le"]), "replace")
    return gzip.compress(made) if dice.random() < 0.1 else made


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.parent.name)
def test_of_a_damaged_file_no_bar_is_taken_that_the_sample_did_not_hold(sample, tmp_path):
    held = bars(sample)
    data = unpacked(sample)
    name = sample.name.replace(".zip", ".csv").replace(".gz", "")
    for number in range(ROUNDS):
        dice = random.Random(f"{sample.parent.name} {number}")
        path = tmp_path / name
        path.write_bytes(damaged(data, dice))
        taken = taken_of(path)
        # The damage may be to a symbol, which can be any text.
        days = {day: bar for (_, day), bar in held.items()}
        wrong = {key: bar for key, bar in taken.items() if key[1] not in days or not same(bar, days[key[1]])}
        assert not wrong, (number, wrong)


def same(bar, held):
    """A column that was lost from the header or the file may be missing; what is there is the sample's."""
    return all(one in (other, None) for one, other in zip(bar, held, strict=True)) or (
        bar[:4] == held[:4] and bar[4] in (held[3], held[4]) and bar[5] in (held[5], None)
    )


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.parent.name)
def test_bytes_that_were_changed_cut_or_doubled_end_in_bars_or_in_a_refusal(sample, tmp_path):
    data = sample.read_bytes()
    for number in range(ROUNDS):
        dice = random.Random(f"{sample.parent.name} bytes {number}")
        made = bytearray(data)
        for _ in range(dice.randint(1, 8)):
            at = dice.randrange(len(made) or 1)
            match dice.randrange(4):
                case 0:
                    made[at : at + 1] = bytes([dice.randrange(256)])
                case 1:
                    del made[at : at + dice.randint(1, 50)]
                case 2:
                    made[at:at] = made[at : at + dice.randint(1, 500)]
                case 3:
                    made[at:at] = dice.randbytes(dice.randint(1, 50))
        path = tmp_path / sample.name
        path.write_bytes(bytes(made))
        taken_of(path)
