#!/usr/bin/env python3
"""This checkout beside another commit, in five minutes: joins, materialization, load and compute, online reads.

    ./larder bench quick             # beside the commit where this branch left origin/main; on main, the one before
    ./larder bench quick v0.1.0

The benchmarks and the packages are this checkout's for both; only src/ is the other commit's. Both take turns, and what
the machine does meanwhile, it does to both. For each case the ratio of their times: the median of the rounds, and the
least and the most. Less than 1: this checkout is quicker. Where the answers differ, the exit code is 1.

PostgreSQL with TimescaleDB is the server that LARDER_TEST_POSTGRES names, as in the tests, or starts in a container of
the trial's image. With neither, only reads are measured. Redis is the local redis-server (Debian: redis-tools);
wrk asks (Debian: wrk).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.feather
import yaml
from psycopg.conninfo import conninfo_to_dict

import data
import serving
import wrk

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # after which no further round begins
ROUNDS = 15
SYMBOLS, DAYS, ROWS = 200, 500, 20_000
COMPUTED_SYMBOLS = 10
READ_SECONDS = 2
TITLES = {
    "join": f"join, {ROWS:,} rows x {sum(map(len, data.VIEWS.values()))} features",
    "materialize": f"materialize, {SYMBOLS} symbols, {len(data.VIEWS)} views",
    "compute": f"load and compute, {COMPUTED_SYMBOLS} symbols x {DAYS * 4:,} days",
}
START_POSTGRES = """
apt-get install -y -qq --no-install-recommends postgresql-17 postgresql-17-timescaledb > /dev/null
cd /etc/postgresql/17/main
echo "listen_addresses = '*'\nshared_preload_libraries = timescaledb\nshared_buffers = 512MB" >> postgresql.conf
echo "local all all trust\nhost all all 0.0.0.0/0 trust" > pg_hba.conf
pg_ctlcluster 17 main start
"""


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def base() -> str:
    """Where this branch left origin/main, or the commit before."""
    with suppress(subprocess.CalledProcessError):
        if (left := git("merge-base", "HEAD", "origin/main")) != git("rev-parse", "HEAD"):
            return left
    return git("rev-parse", "HEAD~1")


@contextmanager
def postgres() -> Iterator[str | None]:
    """A connection string; None where there is no server and no image for one."""
    if given := os.environ.get("LARDER_TEST_POSTGRES"):
        yield given
        return
    docker = partial(subprocess.run, check=True, stdout=subprocess.PIPE, text=True)
    images: list[str] = []
    with suppress(OSError, subprocess.CalledProcessError):
        images = docker(["docker", "images", "--quiet", "--filter", "label=larder.recipe"]).stdout.split()
    if not images:
        yield None
        return
    name = f"larder-bench-quick-{os.getpid()}"
    docker(["docker", "run", "--detach", "--rm", "--name", name, images[0], "sleep", "1800"])
    try:
        docker(["docker", "exec", name, "sh", "-ec", START_POSTGRES])
        address = docker(["docker", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", name]).stdout.strip()
        yield f"host={address} user=postgres dbname=postgres sslmode=disable"
    finally:
        docker(["docker", "rm", "--force", name])


# --- one side of a case, in a process of its own with the other commit's src first in its path ---


def side(case: str, directory: Path) -> Callable[[], Any]:
    """What is timed; what that returns leaves the answer in the directory."""
    import compute
    import historical
    import materialize

    given, url = directory.parent / "feature_store.yaml", os.environ["LARDER_TEST_POSTGRES"]
    series = data.walk(directory / "walk")
    if case == "compute":
        files = directory / "files"
        files.mkdir()
        ratios = data.real_ratios(series)
        drawn = [data.bars_of(number, DAYS * 4, ratios, 1) for number in range(COMPUTED_SYMBOLS)]
        compute.write_files(files, [*map(data.symbol, range(len(drawn)))], data.days_before(DAYS * 4), drawn)

        def load_and_compute() -> float:
            with compute.database(url, f"larder_quick_{directory.name}") as fresh:
                return compute.larder(fresh, files)["seconds"]

        return load_and_compute
    schema = data.schema_of(SYMBOLS, DAYS)
    if case == "join":
        rows = historical.entity_rows(SYMBOLS, DAYS, ROWS)
        kind = "larder.plugins.offline_store.TimescaleOfflineStore"
        return historical.feast(directory, given=given, schema=schema, ttl=data.TTL, rows=rows, type=kind)
    return materialize.feast(directory, given=given, schema=schema, changes=materialize.LARDER)


def serve(case: str, directory: Path) -> None:
    """Answer each line of standard input with seconds."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = side(case, directory)
    print("ready", file=said, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        if callable(result):
            result()
        print(result if isinstance(result, float) else seconds, file=said, flush=True)


# --- both sides ---


class Side(AbstractContextManager["Side"]):
    """A process that runs one case with one commit's src. Raises RuntimeError with its last line if it ends."""

    def __init__(self, case: str, source: Path, directory: Path, url: str) -> None:
        directory.mkdir(parents=True)
        self.log = directory / "log"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", case, str(directory)],
            env=os.environ | {"PYTHONPATH": str(source), "PYTHONOPTIMIZE": "1", "LARDER_TEST_POSTGRES": url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.said()

    def said(self) -> str:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return line
        raise RuntimeError((self.log.read_text().splitlines() or ["it ended"])[-1])

    def __call__(self) -> float:
        assert self.process.stdin
        print("run", file=self.process.stdin, flush=True)
        return float(self.said())

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def answer(directory: Path) -> Any:
    if (table := directory / "answer.feather").exists():
        return pyarrow.feather.read_table(table)
    return text.read_text() if (text := directory / "answer").exists() else None


Cases = dict[str, list[Callable[[], float]]]  # the sides of each, this checkout's first; they return seconds


def read(load: wrk.Load) -> float:
    return 1 / load.run(READ_SECONDS)["requests_per_s"]


def readers(stack: ExitStack, sources: list[Path], place: Path, port: int) -> Cases:
    """Reads of 1 and of 100 symbols from a server of each side; an answer that differs ends the run."""
    found: Cases = {}
    symbols = [f"S{number:04d}.US" for number in range(SYMBOLS)]
    answers = {size: wrk.Answers() for size in (1, 100)}
    for number, source in enumerate(sources):
        directory = place / f"server_{number}"
        directory.mkdir()
        (directory / "feature_store.yaml").write_text(serving.FEATURE_STORE.format(directory=directory, port=port))
        views = serving.fill(directory, symbols, 1)
        features = [f"{view}:{name}" for view, names in views.items() for name in names]
        url, _ = stack.enter_context(serving.servers(directory, 2, ["larder"], source))["larder"]
        for size, same in answers.items():
            requests = [wrk.http_request(url, batch, features) for batch in serving.batches(symbols, size, 1)]
            load = wrk.Load(url, requests, same, 8)
            load.warm()
            sides = found.setdefault(f"reads, {size} x {len(features)} features", [])
            sides.append(partial(read, load))
    return found


def stores(stack: ExitStack, sources: list[Path], place: Path, port: int, url: str) -> Cases:
    """The cases that need PostgreSQL."""
    with psycopg.connect(url) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        server = connection.info
        offline = {"host": server.host, "port": server.port, "database": server.dbname, "user": server.user}
        secret = {"password": server.password or "none", "sslmode": conninfo_to_dict(url).get("sslmode", "prefer")}
    settings = {
        "project": "bench",
        "provider": "local",
        "registry": str(place / "registry.db"),
        "offline_store": {"type": "postgres", **offline, **secret},
        "online_store": {"type": "redis", "connection_string": f"127.0.0.1:{port}"},
        "entity_key_serialization_version": 3,
    }
    (place / "feature_store.yaml").write_text(yaml.safe_dump(settings))
    data.fill(url, SYMBOLS, DAYS, data.walk(place / "walk"))
    found: Cases = {}
    for case, title in TITLES.items():
        try:
            sides = [
                stack.enter_context(Side(case, source, place / f"{case}_{number}", url))
                for number, source in enumerate(sources)
            ]
        except RuntimeError as error:
            print(f"{title}: not compared, for one side cannot run it: {error}")
        else:
            found[title] = [*sides]
    return found


def rounds(cases: Cases, end: float) -> dict[str, list[float]]:
    """The ratios of the two sides' times, round by round; nobody is always first."""
    ratios: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(ROUNDS):
        if number >= 3 and time.monotonic() > end:
            break
        for case, sides in cases.items():
            order = [0, 1] if number % 2 else [1, 0]
            took = {which: sides[which]() for which in order}
            ratios[case].append(took[0] / took[1])
    return ratios


def compare(commit: str) -> bool:
    """Print how this checkout compares; return whether the answers are equal."""
    end = time.monotonic() + SECONDS
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        git("archive", "--output", str(place / "other.tar"), commit, "src")
        with tarfile.open(place / "other.tar") as archive:
            archive.extractall(place, filter="data")
        sources = [ROOT / "src", place / "src"]
        port = stack.enter_context(serving.redis_server(place))
        cases = readers(stack, sources, place, port)
        if url := stack.enter_context(postgres()):
            cases |= stores(stack, sources, place, port, url)
        else:
            print("Reads only: no LARDER_TEST_POSTGRES, and no image of the trial's hosts, which ./larder up makes.")
        print(f"time of this checkout / time of {commit[:12]}: median (least to most)", flush=True)
        for case, ratios in rounds(cases, end).items():
            figures = (statistics.median(ratios), min(ratios), max(ratios))
            print("{:<48} {:.2f} ({:.2f} to {:.2f}), {} rounds".format(case, *figures, len(ratios)))
        different = [
            case for case in ("join", "materialize") if answer(place / f"{case}_0") != answer(place / f"{case}_1")
        ]
        for case in different:
            print(f"{TITLES[case]}: the answers differ.")
    return not different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="to compare with")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side[0], Path(options.side[1]))
    elif not compare(git("rev-parse", f"{options.commit}^{{commit}}") if options.commit else base()):
        sys.exit(1)


if __name__ == "__main__":
    main()
