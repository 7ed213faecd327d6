"""Reads files of bars in a process of its own: what ends that process, a crash or too little memory, costs one file."""

import multiprocessing
import os
import pwd
import signal
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from larder.bars import Batch, Inspection, Options, read
from larder.errors import ConfigError, RefusedFileError
from larder.log import printable

if TYPE_CHECKING:
    import pyarrow as pa


class Reader:
    """One process that reads files, one after the other; a new one where it was lost. A context manager."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._asked = False
        self.told: Inspection | None = None  # of the file that was read last

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self, path: Path, options: Options) -> Iterator[Batch]:
        """bars.read, apart; `told` is what it tells of the file in the end."""
        for good, rejected in self._ask(path, options):
            yield Batch(_table(good), _table(rejected))

    def inspect(self, path: Path, options: Options, take: Callable[["pa.Table"], None] | None = None) -> Inspection:
        """bars.inspect, apart; `take` is given the good bars."""
        try:
            for good, _ in self._ask(path, options):
                if take:
                    take(_table(good))
        except RefusedFileError as error:
            return self.told or Inspection(str(path), refusal=error.message)
        assert self.told
        return self.told

    def _ask(self, path: Path, options: Options) -> Iterator[tuple[bytes, bytes]]:
        """The batches that the process sends, until it says that this is all."""
        self.told = None
        check_file(path)
        if self._asked:  # the last caller did not hear all of it
            self._end()
        pipe = self._start()
        self._asked = True
        try:
            pipe.send((path, options))
            while True:
                kind, content = pipe.recv()
                self._asked = kind == "more"
                if kind == "wrong":
                    raise ConfigError(content)
                if kind == "end":
                    self.told = content
                    if content.refusal:
                        raise RefusedFileError(content.refusal)
                    return
                yield content
        except (EOFError, OSError):
            raise _refused(path, self._end()) from None

    def _start(self) -> Connection:
        if self._pipe is None:
            # Not a fork of this process: a thread of pyarrow could hold a lock at that moment. Pandas, which pyarrow
            # imports for its first array, is imported once, before the forks.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["larder.bars.judge", "larder.bars.survey", "pandas"])
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe

    def _end(self) -> str:
        """End the process; returns what had ended it before."""
        process, pipe = self._process, self._pipe
        self._process, self._pipe, self._asked = None, None, False
        if pipe is None or process is None:
            return ""
        pipe.close()
        process.join(1)
        code = process.exitcode
        process.kill()
        process.join()
        if code == -signal.SIGKILL:
            return "it needs more memory than there is: split it"
        return "reading it crashes" + (f" ({signal.Signals(-code).name})" if code and code < 0 else "")


def check_file(path: Path) -> os.stat_result:
    """That a path is a file which may be read, before anything opens it. Raises RefusedFileError."""
    try:
        str(path).encode()
        state = path.stat()
    except UnicodeEncodeError:
        raise _refused(path, "its name is not UTF-8: rename it") from None
    except FileNotFoundError:
        raise _refused(path, "its link leads nowhere" if path.is_symlink() else "it does not exist any more") from None
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(state.st_mode):  # to open a named pipe would wait for ever
        if stat.S_ISDIR(state.st_mode):
            link = path.is_symlink()
            raise _refused(
                path,
                "it is a link to a folder: put a folder there" if link else f"{user()} may not look into this folder",
            )
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise _refused(path, f"it is {kinds.get(stat.S_IFMT(state.st_mode), 'a device')} and not a file")
    if not os.access(path, os.R_OK):
        raise _refused(path, f"{user()} may not read it (chmod 644 lets everybody)")
    return state


def _refused(path: Path, why: str) -> RefusedFileError:
    return RefusedFileError(f"{printable(path)}: {why}.")


def user() -> str:
    """The name of the user that this process is."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _serve(pipe: Connection) -> None:
    """What the process does: read what it is asked for, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks sees to it
    warnings.simplefilter("ignore")
    with suppress(OSError):  # where memory is short, the kernel is to end this process and not the run
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_answer(pipe, *pipe.recv()))


def _answer(pipe: Connection, path: Path, options: Options) -> tuple[str, Any]:
    told = Inspection(str(path))
    try:
        for batch in read(path, options, told):
            pipe.send(("more", (_bytes(batch.good), _bytes(batch.rejected))))
    except RefusedFileError as error:
        told.refusal = error.message
    except ConfigError as error:
        return "wrong", error.message
    return "end", told


def _bytes(table: "pa.Table") -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(content: bytes) -> "pa.Table":
    import pyarrow as pa

    return pa.ipc.open_stream(content).read_all()
