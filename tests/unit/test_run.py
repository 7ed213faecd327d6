"""./larder test runs what it was asked for, says how it ended and where to read more, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[1] / "run.py"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("run", SOURCE)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the module, with its logs in a checkout of its own."""
    module = load()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOGS", tmp_path / ".larder/test")
    before = {number: signal.getsignal(number) for number in module.SIGNALS}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ends(run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run shell commands as parts; return what was printed, and expect an exit code."""

    def ends(code: int, **parts: str) -> str:
        commands = {name: (lambda script=script: [["sh", "-c", script]]) for name, script in parts.items()}
        monkeypatch.setattr(run, "chosen", lambda _names: commands)
        with pytest.raises(SystemExit) as ended:
            run.main()
        assert ended.value.code == code
        return capsys.readouterr().out

    return ends


def test_every_scenario_of_molecule_is_part_of_the_whole_check_and_soak_and_bench_are_not() -> None:
    module = load()
    scenarios = {path.parent.name for path in SOURCE.parents[1].glob("molecule/*/molecule.yml")}
    assert set(module.chosen([])) == {"lint", "unit"} | scenarios - {*module.LONG}
    soak = [command for commands in (module.chosen(["soak"])["soak"](),) for words in commands for command in words]
    assert {*module.LONG} <= {*soak} & scenarios
    assert set(module.LONGEST_FIRST) == scenarios
    assert {path.parent.name for path in SOURCE.parents[1].glob(module.OTHERS_GLOB)} == {
        "soak",
        "soak_restore",
        "bench",
    }
    assert module.chosen(["soak"])["soak"]()[0][:2] == ["env", f"MOLECULE_GLOB={module.OTHERS_GLOB}"]


def test_quick_is_lint_and_unit() -> None:
    module = load()
    assert list(module.chosen(["quick"])) == ["lint", "unit"]
    assert list(module.chosen(["quick", "redis"])) == ["lint", "unit", "redis"]


def test_one_name_is_one_part_and_a_long_one_is_all_of_it() -> None:
    module = load()
    assert list(module.chosen(["redis"])) == ["redis"]
    assert module.chosen(["redis"])["redis"]() == [
        ["molecule", "test", "--no-command-borders", "--scenario-name", "redis"]
    ]
    assert "LARDER_SOAK=1" in module.chosen(["rotation"])["rotation"]()[0]
    assert "rotation" not in module.chosen([])


def test_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SystemExit) as ended:
        load().chosen(["redis", "radis"])
    assert str(ended.value.code).startswith("larder test: no such part: radis; there are quick, lint, unit, default, ")


def test_last_line_is_the_sum_and_nothing_else(ends: Callable[..., str]) -> None:
    assert ends(0, one="true", two="true").endswith(" s in all\n2 passed, 0 failed\n")
    assert ends(1, one="true", two="false").endswith(" s in all\n1 passed, 1 failed\n")


def test_a_failed_part_shows_its_log_and_its_errors_without_colours(ends: Callable[..., str], tmp_path: Path) -> None:
    wrong = "\\033[0;31mfatal: [cache1]: FAILED!\\033[0m\\n" + "line\\n" * 30
    said = ends(1, redis=f"printf '{wrong}'; exit 1")
    assert said.startswith("==> redis; output in .larder/test/redis.log\n")
    assert "s: .larder/test/redis.log\n" in said
    assert "\nfatal: [cache1]: FAILED!\nline\n" in said
    assert "\x1b[0;31mfatal" in (tmp_path / ".larder/test/redis.log").read_text()


def test_a_failed_part_is_shown_while_others_run(ends: Callable[..., str], tmp_path: Path) -> None:
    """Whoever ends a check that takes too long has seen it."""
    one, two = f"echo broken; touch {tmp_path}/one; false", f"until [ -e {tmp_path}/one ]; do :; done; sleep 3"
    said = ends(1, one=one, two=two)
    assert said.index("\nbroken\n") < said.index("passed two")


def test_a_part_ends_at_its_first_command_that_fails(run: ModuleType, tmp_path: Path) -> None:
    run.LOGS.mkdir(parents=True)
    commands = [["false"], ["touch", str(tmp_path / "second")]]
    assert run.Lanes().run("part", lambda: commands)[:2] == ("part", False)
    assert not (tmp_path / "second").exists()


def test_a_scenario_has_the_environment_of_the_caller(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run.LOGS.mkdir(parents=True)
    monkeypatch.setenv("ANSIBLE_FORCE_COLOR", "1")
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    assert run.Lanes().run("redis", lambda: [[sys.executable, "-S", "-c", show]])[1]
    assert json.loads((run.LOGS / "redis.log").read_text()) == dict(os.environ)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_stopped_by_a_signal_leaves_neither_process_nor_host(tmp_path: Path, number: signal.Signals) -> None:
    """A part whose command started others, and a molecule that writes down what it is called with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "molecule").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/called\n')
    (programs / "molecule").chmod(0o755)
    code = f"""
import sys
sys.path.insert(0, {str(SOURCE.parent)!r})
import run
from pathlib import Path
run.ROOT = Path({str(tmp_path)!r})
run.LOGS = run.ROOT / "logs"
run.chosen = lambda names: {{"redis": lambda: [["sh", "-c", "sleep 300 & echo $! > child; echo $$ > started; wait"]]}}
run.main()
"""
    env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}: redis" in said
    assert (tmp_path / "called").read_text() == "destroy --no-command-borders --scenario-name redis\n"
    for name in ("started", "child"):
        stat = Path("/proc", (tmp_path / name).read_text().strip(), "stat")
        deadline = time.monotonic() + 60
        # A killed process may take a moment to end, and then wait for somebody to ask how it ended.
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X"):
            assert time.monotonic() < deadline, f"the process {name} is still there"
            time.sleep(0.05)
