"""One host runs the pipeline, the others are spares: whatever their schedules say, the database refuses theirs."""

import os

import psycopg
import pytest
from click.testing import CliRunner

from larder.cli import main
from larder.errors import BusyError, SpareError
from larder.operations import active, apply, pipeline

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)


@pytest.fixture
def on(monkeypatch):
    return lambda host: monkeypatch.setenv("LARDER_HOST", host)


def run(credentials, tmp_path):
    incoming = tmp_path / "incoming"
    incoming.mkdir(exist_ok=True)
    pipeline.run(credentials, ["load"], [incoming], tmp_path)


def test_the_first_host_that_runs_has_the_pipeline_and_another_is_refused(credentials, tmp_path, on):
    assert active.active(credentials) is None
    on("pipeline1")
    run(credentials, tmp_path)
    assert active.active(credentials) == "pipeline1"
    on("pipeline2")
    with pytest.raises(
        SpareError, match=r"pipeline1 runs the pipeline, and pipeline2 is a spare: ansible/move_pipeline"
    ):
        run(credentials, tmp_path)
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "views.py").touch()
    with pytest.raises(SpareError):
        apply.apply(credentials, repository)


def test_a_move_lets_the_new_host_run_and_refuses_the_former_one(credentials, tmp_path, on):
    assert active.claim(credentials, "pipeline1") == "pipeline1"
    assert active.claim(credentials, "pipeline2") == "pipeline1"
    active.move(credentials, "pipeline2")
    on("pipeline1")
    with pytest.raises(SpareError):
        run(credentials, tmp_path)
    on("pipeline2")
    run(credentials, tmp_path)


def test_a_move_waits_for_a_run_of_a_host_that_is_not_known_to_be_dead(url, credentials):
    active.claim(credentials, "pipeline1")
    with psycopg.connect(url, autocommit=True) as run_of_pipeline1:
        run_of_pipeline1.execute("SELECT pg_advisory_lock(hashtextextended('larder run', 0))")
        with pytest.raises(BusyError) as error:
            active.move(credentials, "pipeline2")
        assert error.value.exit_code == 4
        assert active.active(credentials) == "pipeline1"
        run_of_pipeline1.execute("SELECT pg_advisory_unlock_all()")
    active.move(credentials, "pipeline2")
    assert active.active(credentials) == "pipeline2"


def test_the_command_says_and_moves(credentials):
    def ask(*arguments):
        return CliRunner().invoke(main, ["--credentials", str(credentials.directory), "active", *arguments]).output

    assert ask() == "\n"
    assert ask("pipeline1", "--if-none") == ask() == ask("pipeline2", "--if-none") == "pipeline1\n"
    assert ask("pipeline2") == ask() == "pipeline2\n"
