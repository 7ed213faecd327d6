"""Bars read in a process of its own, so that whatever a file does to its reader, only this file is refused.

A parser in C may crash for what a file holds, and an archive may unpack to more than the memory there is: then this
process ends, and the next file gets a new one.
"""

import pickle
import select
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import IO, Any

from larder.bars import Batch, Options, printable, read
from larder.errors import ConfigError, RefusedFileError

SILENT_SECONDS = 900  # a file of many millions of bars is surveyed in a minute or two
LENGTH = struct.Struct("<Q")
# Kinds of messages to the caller.
BATCH, REFUSED, WRONG, END = range(4)


class Reader:
    """Reads file after file in one process, which is replaced where a file ends it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    with suppress(OSError):
                        pipe.close()
            self.process = None

    def read(self, path: Path, options: Options | None = None) -> Iterator[Batch]:
        """As larder.bars.read."""
        ended = False
        try:
            yield from self._read(path, options or Options())
            ended = True
        except (RefusedFileError, ConfigError):
            ended = self.process is not None
            raise
        finally:
            if not ended:  # what the process still has to say is of this file
                self.close()

    def _read(self, path: Path, options: Options) -> Iterator[Batch]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "larder.bars.process"],
                # Without a buffer: select says nothing of what a buffer holds.
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self.process.stdin
        assert self.process.stdout
        try:
            _send(self.process.stdin, (path, options))
            while True:
                if not select.select([self.process.stdout], [], [], SILENT_SECONDS)[0]:
                    raise RefusedFileError(f"{printable(path)}: its reader said nothing for {SILENT_SECONDS} s.")
                kind, value = _receive(self.process.stdout)
                if kind == BATCH:
                    yield value
                elif kind == END:
                    return
                else:
                    raise (RefusedFileError if kind == REFUSED else ConfigError)(value)
        except (EOFError, BrokenPipeError):
            status = self.process.wait()
            self.close()
            how = Signals(-status).name if status < 0 else f"exit code {status}"
            raise RefusedFileError(
                f"{printable(path)}: its reader crashed ({how}), or needed more memory than there is."
            ) from None


def _send(pipe: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message)
    left = memoryview(LENGTH.pack(len(data)) + data)
    while left:
        left = left[pipe.write(left) :]
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    (length,) = LENGTH.unpack(_exactly(pipe, LENGTH.size))
    return pickle.loads(_exactly(pipe, length))  # noqa: S301 -- between two processes of this program


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main() -> None:
    """Answer paths on standard input with batches on standard output, until there are no more."""
    # Where memory runs out, the kernel ends this process before its caller.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no answer
    while True:
        try:
            path, options = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            for batch in read(path, options):
                _send(answers, (BATCH, batch))
            _send(answers, (END, None))
        except RefusedFileError as error:
            _send(answers, (REFUSED, error.message))
        except ConfigError as error:
            _send(answers, (WRONG, error.message))


if __name__ == "__main__":
    main()
