"""What computed_views.yml may hold: a mistake is one sentence that names the entry, before anything has changed."""

import os
import shutil
import sys
from pathlib import Path
from subprocess import run

import pytest
import yaml

from larder.errors import ConfigError
from larder.features import definitions
from larder.features.definitions import DefinitionError
from larder.features.formulas import Formulas

REPO = Path(__file__).parents[2] / "feature_repo"
TABLES = """
schemas: [risk]
tables:
  - name: risk.limits
    columns:
      - {name: account_id, type: bigint, nullable: false}
      - {name: valid_from, type: timestamptz, nullable: false}
      - {name: used, type: double precision}
      - {name: allowed, type: numeric}
      - {name: tier, type: text}
    primary_key: [account_id, valid_from]
    hypertable: {time_column: valid_from, chunk_interval: 30 days}
    grants: {pipeline: [select]}
"""
VIEWS = """
views:
  - name: utilisation
    source: risk.limits
    features:
      - {name: share, formula: used / allowed, description: What is used of the limit}
      - {name: breaches, type: Int64, running_total: used > allowed}
"""


@pytest.fixture
def repository(tmp_path):
    def write(views=VIEWS, tables=TABLES, code=None):
        (tmp_path / "computed_views.yml").write_text(views)
        (tmp_path / "tables.yml").write_text(tables)
        if code:
            (tmp_path / "formulas.py").write_text(code)
        return tmp_path

    return write


def test_table_follows_from_a_view(repository):
    *_, table = definitions.read(repository()).tables()
    assert table == {
        "name": "features.utilisation",
        "columns": [
            {"name": "account_id", "type": "bigint", "nullable": False},
            {"name": "valid_from", "type": "timestamptz", "nullable": False},
            {"name": "share", "type": "double precision"},
            {"name": "breaches", "type": "bigint"},
            {"name": "run_id", "type": "integer"},
        ],
        "primary_key": ["account_id", "valid_from"],
        "hypertable": {"time_column": "valid_from", "chunk_interval": "365 days"},
        "indexes": [{"columns": ["valid_from DESC"]}],
        "grants": {"pipeline": ["select", "insert", "update"], "train": ["select"]},
    }


def test_repository_without_computed_views_needs_nothing(tmp_path):
    assert definitions.read(tmp_path).tables() == []
    Formulas(tmp_path).try_out()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("used / allowed,", "used / alowed,", "alowed is no column of risk.limits, no term"),
        ("used / allowed,", '"used / ",', "'used / ', which is no expression"),
        ("used / allowed,", "3,", "utilisation.share needs a text for either formula or running_total"),
        ("used / allowed,", "tier,", "tier is no column"),
        ("used / allowed,", "breaches + 1,", "reads breaches, a running total, which no other formula may"),
        ("type: Int64", "type: int", "utilisation.breaches has the type 'int'; it may be Float64 or Int64"),
        ("type: Int64", "dtype: Int64", "utilisation: dtype is unknown"),
        ("name: breaches", "name: share", "utilisation.share and utilisation.share have one name"),
        ("name: breaches", "name: Breaches", "'Breaches' needs a name of small letters"),
        ("name: breaches", "name: valid_from", "has the name of a key of risk.limits"),
        ("name: breaches, ", "", "lacks name"),
        ("risk.limits", "risk.limit", "computes from risk.limit, which tables.yml does not declare"),
        ("utilisation", "x" * 64, "at most 63"),
        ("    source: risk.limits\n", "", "views: utilisation lacks source"),
        ("    source:", "    ttl_days: 0\n    source:", "ttl_days 0; it may be 1 to 36500"),
        ("    source:", "    tags: [a]\n    source:", "has the tags ['a']"),
        ("    source:", "    name: again\n    source:", "name is there twice"),
        ("views:", "sources: [{table: risk.other}]\nviews:", "source risk.other, and no view is computed from it"),
        (
            "views:",
            "sources: [{table: risk.limits, terms: {x: y}}]\nviews:",
            "the term x has the formula 'y', and y",
        ),
        ("views:", "sources: [{table: risk.limits, rows_before: -1}]\nviews:", "rows_before -1; it may be 0 or more"),
        ("views:", "views: [", "no valid YAML"),
    ],
)
def test_mistake_is_one_sentence(repository, old, new, sentence):
    assert old in VIEWS
    with pytest.raises(DefinitionError) as error:
        definitions.read(repository(VIEWS.replace(old, new)))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("{pipeline: [select]}", "{train: [select]}", "have to give select to pipeline"),
        (
            "[account_id, valid_from]",
            "[account_id, tier, valid_from]",
            "a hypertable whose primary key is one column",
        ),
        ("account_id, type: bigint", "account_id, type: uuid", "one column (text or bigint) and its time"),
        ("risk.limits", "features.utilisation", "computes from risk.limits, which tables.yml does not declare"),
        ("tables:", "table:", "tables None; it has to be a list"),
    ],
)
def test_mistake_in_the_source_is_one_sentence(repository, old, new, sentence):
    with pytest.raises(DefinitionError) as error:
        definitions.read(repository(tables=TABLES.replace(old, new)))
    assert sentence in str(error.value)


def test_table_is_declared_once(repository):
    twice = yaml.safe_load(TABLES)
    twice["tables"].append(twice["tables"][0] | {"name": "features.utilisation"})
    with pytest.raises(DefinitionError, match=r"tables\.yml has the table features\.utilisation"):
        definitions.read(repository(tables=yaml.safe_dump(twice)))


@pytest.mark.parametrize(
    ("formula", "sentence"),
    [
        ("np.flip(used)", "utilisation.share looks ahead"),
        ("used - used.mean()", "utilisation.share looks ahead"),
        ("np.maximum.accumulate(used)", "reads more than the 1250 rows before a row: raise rows_before"),
        ("used.sum()", "share gives float64 of shape (); it has to give one number for each"),
        ("'used[1:]'", "share gives float64 of shape"),
        ("np.nothing(used)", "share cannot be computed: AttributeError"),
        ("share + 1", "share -> share is defined by itself"),
    ],
)
def test_formula_that_breaks_a_rule_is_refused_before_it_is_applied(repository, formula, sentence):
    code = "import numpy as np\n"
    with pytest.raises(ConfigError) as error:
        Formulas(repository(VIEWS.replace("used / allowed", formula), code=code)).try_out()
    assert sentence in error.value.message


def test_feature_of_the_stack_is_one_entry(tmp_path):
    """An entry in computed_views.yml and nothing else: its column, its Feast field and its values follow."""
    repo = shutil.copytree(REPO, tmp_path / "repo")
    path = repo / "computed_views.yml"
    entry = '      - {name: willr_14, formula: "talib.WILLR(high, low, close, 14)", description: Williams %R}\n'
    path.write_text(path.read_text().replace("      - {name: roc_10", entry + "      - {name: roc_10"))
    found = definitions.read(repo)
    [table] = [table for table in found.tables() if table["name"] == "features.technical_indicators_momentum"]
    assert {"name": "willr_14", "type": "double precision"} in table["columns"]
    Formulas(repo).try_out()
    program = "import feature_views; print(feature_views.technical_indicators_momentum)"
    environment = os.environ | {"PYTHONPATH": str(REPO.parent / "src")}
    shown = run([sys.executable, "-c", program], cwd=repo, env=environment, capture_output=True, text=True, check=True)
    assert "willr_14" in shown.stdout
