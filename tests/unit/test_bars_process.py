"""A file that ends its reader is refused by name; the files after it are read."""

import os
import signal
from pathlib import Path

import pytest

from larder.bars import Options, inspect
from larder.bars.process import Reader
from larder.errors import ConfigError, RefusedFileError

SAMPLE = Path(__file__).with_name("samples") / "yahoo/YHO.csv"


@pytest.fixture
def reader():
    with Reader() as reader:
        yield reader


def bars(reader, path=SAMPLE, **options):
    return sum(batch.good.num_rows for batch in reader.read(path, Options(**options)))


def test_bars_are_the_same_as_without_a_process_and_one_process_reads_all_files(reader):
    assert [bars(reader), bars(reader)] == [10, 10]
    first = reader.process.pid
    with pytest.raises(RefusedFileError) as caught:
        bars(reader, SAMPLE, columns={"close": "Nothing"})
    assert caught.value.message == inspect(SAMPLE, Options(columns={"close": "Nothing"})).refusal
    with pytest.raises(ConfigError):
        bars(reader, format="none")
    assert bars(reader) == 10
    assert reader.process.pid == first


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_file_that_crashes_its_reader_is_refused_by_name_and_the_next_one_is_read(reader, tmp_path, how):
    pipe = tmp_path / "crash.csv"
    os.mkfifo(pipe)
    assert bars(reader) == 10
    os.kill(reader.process.pid, how)
    with pytest.raises(RefusedFileError, match=f"YHO.csv: its reader crashed .{how.name}."):
        bars(reader)
    assert bars(reader) == 10


def test_a_file_that_is_left_in_the_middle_says_nothing_to_the_next(reader, tmp_path):
    large = tmp_path / "LARGE.csv"
    large.write_text(
        "Symbol,Date,Open,High,Low,Close\n" + "".join(f"S{n},2024-09-23,1,3,1,2\n" for n in range(200_000))
    )
    for _ in reader.read(large):
        break
    assert bars(reader) == 10
