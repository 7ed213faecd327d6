"""The command line: quick, one sentence where something is wrong, an exit code that means something."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import larder as larder_package
from larder.cli import main
from larder.errors import ConfigError
from larder.features import record
from larder.features.formulas import Formulas, prices
from larder.operations.apply import fingerprint
from larder.operations.credentials import Credentials

REPO = Path(__file__).parents[2] / "feature_repo"


@pytest.fixture
def credentials(tmp_path):
    def write(feature_store):
        (tmp_path / "feature_store.yaml").write_text(feature_store)
        (tmp_path / "load_url").write_text("postgresql://u:se%zzcret@h/db\n")
        return tmp_path

    return write


def larder(*arguments, env=None):
    return CliRunner().invoke(main, list(map(str, arguments)), env=env or {"CREDENTIALS_DIRECTORY": ""})


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(main.commands))])
def test_help_tells_the_exit_codes(command):
    result = larder(*command, "--help")
    assert result.exit_code == 0
    assert "4  another one is running" in result.output


def test_help_waits_for_no_heavy_import():
    heavy = "{'feast', 'pandas', 'talib', 'pyarrow', 'numpy'}"
    code = f"import sys, larder.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(larder_package.__file__).parents[1])}
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["load", "."], 2, "No credentials: give --credentials DIR"),
        (["--credentials", "/nowhere", "load", "."], 2, "/nowhere is not a directory"),
        (["run", "--stages", "lode"], 2, "it may hold load, compute, materialize, check"),
        (["materialize", "--days", "0"], 2, "--days"),
        (["load", "/nowhere.csv"], 2, "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(arguments, code, says):
    result = larder(*arguments)
    assert result.exit_code == code
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_log_level_that_is_none_is_told():
    result = larder("load", ".", env={"LARDER_LOG_LEVEL": "loud"})
    assert result.exit_code == 2
    assert "debug, info, warning, error" in result.output


def test_prices_that_are_none_are_told(monkeypatch):
    monkeypatch.setenv("LARDER_INDICATOR_PRICES", "adjusted")
    with pytest.raises(ConfigError, match="LARDER_INDICATOR_PRICES is 'adjusted'; it may be close or adjusted_close"):
        prices()


@pytest.mark.parametrize(
    "given",
    [
        "secret",
        '["secret"]',
        '[{"purpose": "serve", "name": "feature_store.yaml", "content": "project: secret"}]',
        '[{"purpose": "serve", "name": "feature_store.yaml", "content": "a: \'secret"}]',
        '[{"purpose": "load", "name": "load_url", "content": "postgresql://u:se%zzcret@h/db"}]',
    ],
)
def test_what_cannot_be_probed_is_not_shown(given):
    result = CliRunner().invoke(main, ["probe"], input=given)
    assert result.exit_code == 2
    assert "secret" not in result.output
    assert "cret" not in result.output
    assert "Traceback" not in result.output


def test_a_url_that_cannot_be_parsed_is_not_shown(credentials):
    result = larder("--credentials", credentials("project: x"), "load", ".")
    assert result.exit_code == 2
    assert "The PostgreSQL URL of load is not valid" in result.output
    assert "cret" not in result.output


@pytest.mark.parametrize(
    "text", ["a: 'secret", "- secret", "project: x\nregistry: secret", "project: x\nregistry: {path: secret.db}"]
)
def test_a_feature_store_that_cannot_be_used_is_not_shown(credentials, text):
    with pytest.raises(ConfigError) as caught:
        _ = Credentials(credentials(text)).registry_url
    assert "secret" not in caught.value.message


def test_the_registry_url_is_read_as_feast_reads_it(credentials, monkeypatch):
    monkeypatch.setenv("HOST", "db.example")
    directory = credentials(
        "project: x\nregistry: {path: 'postgresql+psycopg://u:p%40@$HOST/feast?options=-csearch_path%3Dr'}"
    )
    assert Credentials(directory).registry_url == "postgresql://u:p%40@db.example/feast?options=-csearch_path%3Dr"


def test_the_fingerprint_follows_what_feast_reads(tmp_path):
    (tmp_path / "views.py").write_text("a = 1")
    first = fingerprint(tmp_path)
    (tmp_path / "notes.md").write_text("nothing to Feast")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x.py").write_text("hidden")
    assert fingerprint(tmp_path) == first
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/more.py").write_text("b = 1")
    second = fingerprint(tmp_path)
    assert second != first
    (tmp_path / "sub/more.py").rename(tmp_path / "sub/other.py")
    assert fingerprint(tmp_path) not in (first, second)


def test_other_formulas_functions_prices_or_ta_lib_are_other_definitions(tmp_path, monkeypatch):
    repo = shutil.copytree(REPO, tmp_path / "repo")

    def changed(file, old, new):
        original = (repo / file).read_text()
        assert old in original
        (repo / file).write_text(original.replace(old, new))
        try:
            return record.fingerprint(Formulas(repo)) != as_they_are
        finally:
            (repo / file).write_text(original)

    as_they_are = record.fingerprint(Formulas(repo))
    assert as_they_are == record.fingerprint(Formulas(REPO))
    assert changed("computed_views.yml", "talib.SMA(close, 5)", "talib.SMA(close, 6)")
    assert changed("computed_views.yml", "as_loaded.low * scale", "as_loaded.low")
    assert changed("computed_views.yml", "rows_before: 1250", "rows_before: 1500")
    assert changed("formulas.py", "direction[:1] = 1", "direction[:1] = 0")
    assert not changed("computed_views.yml", "How far prices move", "How far prices go")
    assert record.fingerprint(Formulas(repo, "adjusted_close")) != as_they_are
    monkeypatch.setattr(record, "version", lambda name: f"another {name}")
    assert record.fingerprint(Formulas(repo)) != as_they_are


def test_apply_refuses_a_formula_that_looks_ahead_before_it_asks_the_registry(credentials, tmp_path):
    repo = shutil.copytree(REPO, tmp_path / "repo")
    views = repo / "computed_views.yml"
    views.write_text(views.read_text().replace("talib.SMA(close, 5)", "close - close.mean()"))
    directory = credentials(
        "project: p\nregistry: {registry_type: sql, path: 'postgresql+psycopg://u:p@192.0.2.1/d'}\n"
    )
    result = larder("--credentials", directory, "apply", "--repo", repo)
    assert result.exit_code == 2, result.output
    assert "technical_indicators_ma.sma_5 looks ahead" in result.output


def test_features_are_listed_with_their_formulas():
    result = larder("features", "--repo", REPO)
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 42
    line = "technical_indicators_ma:sma_5 Float64 talib.SMA(close, 5) SMA(C, 5)"
    assert line in [" ".join(shown.split()) for shown in result.output.splitlines()]


def test_a_repository_without_definitions_would_delete_all_and_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no feature definitions"):
        fingerprint(tmp_path)
