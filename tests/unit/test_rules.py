"""What quality.yml may hold, what a rule says of bars, and what drift is: a mistake is one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from larder.features import definitions
from larder.operations import drift
from larder.quality import judge, rules
from larder.quality.rules import RuleError

ROOT = Path(__file__).parents[2]
REPO = ROOT / "feature_repo"
FEATURES = definitions.read(REPO).features()
DAY = 86_400_000_000


def read(tmp_path, text):
    (tmp_path / "quality.yml").write_text(text)
    return rules.read(tmp_path, FEATURES)


def test_own_rules_are_right_and_every_feature_but_a_total_is_judged_for_drift():
    asked = rules.read(REPO, FEATURES)
    assert {rule.rule for rule in asked.bars} == {"split", "jump", "spike", "repeat"}
    assert {rule.rule for rule in asked.days} == {"gap", "frozen"}
    assert asked.drift.left_out == ("volume_indicators:obv",)
    assert [table["name"] for table in asked.tables()] == [f"quality.{name}" for name in (
        "findings", "quarantine", "checks", "references", "drift"
    )]  # fmt: skip


def test_a_repository_without_rules_has_none_and_needs_no_tables(tmp_path):
    assert not rules.read(tmp_path)
    assert rules.read(tmp_path).tables() == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bars: [", "no valid YAML"),
        ("- x", "quality.yml holds no mapping."),
        ("bars: {}\nbars: {}", "bars is there twice"),
        ("bar: []", "bar is unknown; there may be bars, days, drift, features, history."),
        ("bars: {rule: jump}", "bars holds {'rule': 'jump'}; it has to be a list of rules."),
        ("bars: [{rule: gap, severity: warn}]", "bars: entry 1 is {'rule': 'gap', 'severity': 'warn'}; it has to be"),
        ("bars: [{rule: jump, deviations: 8, severity: warn}]", "bars: jump lacks ratio."),
        (
            "bars: [{rule: jump, deviations: 0, ratio: 2, severity: warn}]",
            "deviations is 0; it has to be a number above 0",
        ),
        ("bars: [{rule: jump, deviations: 8, ratio: 1, severity: warn}]", "ratio is 1; it has to be a ratio above 1"),
        (
            "bars: [{rule: jump, deviations: yes, ratio: 2, severity: warn}]",
            "deviations is True; it has to be a number",
        ),
        ("bars: [{rule: jump, deviations: 8, ratio: 2}]", "severity is None; it may be reject, quarantine, warn."),
        ("bars: [{rule: jump, deviations: 8, ratio: 2, severity: fail}]", "severity is 'fail'; it may be reject"),
        (
            "bars: [{rule: jump, deviation: 8, ratio: 2, severity: warn}]",
            "bars: jump: deviation is unknown; there may be",
        ),
        (
            "bars: [{rule: split, ratios: [2], within: 0.1, severity: warn}]",
            "ratios is [2]; it has to be a list of ratios",
        ),
        ('bars: [{rule: split, ratios: ["2:2"], within: 0.1, severity: warn}]', "has to be a list of ratios such as"),
        ("bars: [{rule: range, column: clse, most: 1, severity: warn}]", "column is 'clse'; it may be open, high, low"),
        ("bars: [{rule: range, column: close, severity: warn}]", "bars: range close lacks least, or most, or both."),
        (
            "bars: [{rule: range, column: close, least: 2, most: 1, severity: warn}]",
            "least is 2.0; it may not be above most",
        ),
        ("bars: [{rule: repeat, bars: 1, severity: warn}]", "bars is 1; it has to be a whole number from 2 to 1000."),
        (
            "bars: [{rule: repeat, bars: 3, severity: warn}, {rule: repeat, bars: 4, severity: warn}]",
            "the rule repeat twice",
        ),
        ("days: [{rule: frozen, bars: 2, most: 2, severity: warn}]", "most is 2; it has to be a share from 0 to 1."),
        ("days: [{rule: gap, days: 9, severity: quarantine}]", "severity is 'quarantine'; it may be warn, fail."),
        ("features: [{rule: range, feature: x:y, least: 0, severity: warn}]", "there is no computed feature 'x:y'"),
        ("features: [{rule: nulls, view: x, most: 0, severity: warn}]", "there is no computed view 'x'"),
        ("features: [{rule: nulls, most: 0, severity: warn}]", "features: nulls: it needs a view or feature."),
        ("history: {bars_before: 10}", "fewest_bars is 20; it may not be more than bars_before, 10."),
        ("history: {confirmed_by: 0}", "history: confirmed_by is 0; it has to be a whole number from 1 to 1000."),
        ("drift: {bins: 2}", "drift: bins is 2; it has to be a whole number from 4 to 50."),
        ("drift: {scaled: {close: [a:b]}}", "drift: scaled: close: there is no computed feature 'a:b'"),
        (
            'drift: {scaled: {clse: ["ohlcv_features:open"]}}',
            "computed from a table without a column clse; it has open,",
        ),
        ('drift: {left_out: ["ohlcv_feature:*"]}', "drift: left_out: there is no computed feature 'ohlcv_feature:*'"),
        (
            'drift: {scaled: {close: ["ohlcv_features:open"]}, left_out: ["ohlcv_features:*"]}',
            "ohlcv_features:open is scaled and left_out; it may be one of them.",
        ),
        ('drift: {groups: {us: "("}}', "drift: groups: us is '('; it has to be a regular expression of symbols."),
        ("drift: {groups: {US: x}}", "'US' needs a name of small letters"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_rule(tmp_path, text, sentence):
    with pytest.raises(RuleError) as error:
        read(tmp_path, text)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_preflight_refuses_a_wrong_rule_on_the_controller(tmp_path):
    """By the lookup that preflight and the role timescaledb ask for the tables, in Ansible's own environment."""
    repository = shutil.copytree(REPO, tmp_path / "repository")
    (repository / "quality.yml").write_text("bars: [{rule: repeat, bars: 1, severity: warn}]\n")
    asked = f"query('larder.stack.feature_tables', '{repository}/tables.yml')"
    command = [Path(sys.executable).with_name("ansible"), "localhost", "-m", "debug", "-a", f"msg={{{{ {asked} }}}}"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert "quality.yml: bars: repeat: bars is 1; it has to be a whole number from 2 to 1000." in " ".join(
        (done.stdout + done.stderr).split()
    )


def series(close, **columns):
    close = np.asarray(close, dtype=float)
    count = len(close)
    values = {"open": close, "high": close * 1.01, "low": close * 0.99, "close": close, "adjusted_close": close}
    values["volume"] = np.full(count, 1000.0)
    return judge.Series(
        ["A"], np.zeros(count, int), np.arange(count) * DAY, {**values, **columns}, np.ones(count, bool)
    )


def walk(count=120, deviation=0.02, seed=1):
    return 100 * np.exp(np.random.default_rng(seed).normal(0, deviation, count).cumsum())


def levels(close, text='bars: [{rule: split, ratios: ["2:1", "1:10"], within: 0.06, severity: quarantine}, '
                       '{rule: jump, deviations: 8, ratio: 1.4, severity: quarantine}]', tmp_path=None):  # fmt: skip
    return [(one.row, one.rule, one.severity) for one in judge.judge(read(tmp_path, text), series(close))]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda close: close, []),
        (lambda close: np.append(close, close[-1] * 2), [(120, "jump", "quarantine")]),
        (lambda close: np.append(close, close[-1] / 2), [(120, "split", "quarantine")]),
        (lambda close: np.append(close, close[-1] * 10), [(120, "split", "quarantine")]),
        (lambda close: np.append(close, close[-1] / 3), [(120, "jump", "quarantine")]),
        # Wrong for one day: the bars after it are right again.
        (lambda close: np.concatenate((close[:60], close[60:61] * 2, close[61:])), [(60, "jump", "quarantine")]),
        (lambda close: np.concatenate((close[:60], close[60:62] / 2, close[62:])), [
            (60, "split", "quarantine"), (61, "split", "quarantine")]),
        # For good.
        (lambda close: np.concatenate((close[:60], close[60:] / 2)), [(60, "split", "warn")]),
        # Too few bars before it to know what is usual.
        (lambda close: np.concatenate((close[:15], close[15:] * 3)), []),
        # A split and a wrong price.
        (lambda close: np.concatenate((close[:60], close[60:-1] / 2, close[-1:] * 5)), [
            (60, "split", "warn"), (119, "split", "quarantine")]),
    ],
)  # fmt: skip
def test_a_jump_and_a_split_are_found_where_they_are(tmp_path, change, found):
    assert levels(change(walk()), tmp_path=tmp_path) == found


def test_a_wild_share_has_no_jump_on_its_usual_days(tmp_path):
    assert levels(walk(1000, 0.12), tmp_path=tmp_path) == []
    assert levels(walk(1000, 0.02, 3), tmp_path=tmp_path) == []


def test_bars_of_one_symbol_are_not_judged_by_those_of_another(tmp_path):
    asked = read(tmp_path, "bars: [{rule: jump, deviations: 8, ratio: 1.4, severity: warn}, "
                           "{rule: repeat, bars: 3, severity: warn}]")  # fmt: skip
    close = np.concatenate((walk(60), walk(60, seed=2) * 50, [7.0, 7.0], [7.0, 7.0]))
    both = series(close)
    both.symbol[60:120] = 1
    both.symbol[120:122] = 2
    both.symbol[122:] = 3
    both = judge.Series(["A", "B", "C", "D"], both.symbol, both.time, both.columns, both.judged)
    assert judge.judge(asked, both) == []


def test_what_is_stored_is_not_judged_again():
    bars = series(np.append(walk(), 1.0))
    bars.judged[:] = False
    assert judge.judge(rules.read(REPO), bars) == []


def test_a_stored_bar_is_good_however_far_it_is_from_the_last_good_one():
    """A bar that comes late, before a level that somebody released."""
    close = np.concatenate((walk(60), [0.0], walk(20, seed=2)))
    close[61:] *= 3
    close[60] = close[59] * 10
    late = series(close)
    late.judged[:] = False
    late.judged[60] = True
    (found,) = judge.judge(rules.read(REPO), late)
    assert (found.row, found.rule, found.severity) == (60, "split", "quarantine")


def test_psi_is_that_of_its_formula_and_ks_the_largest_distance():
    reference, now = np.array([50.0, 30, 20]), np.array([20.0, 30, 50])
    value, bins = drift.psi(reference, now, 10)
    assert bins == 3
    assert value == pytest.approx(0.3 * np.log(2.5) - 0.3 * np.log(0.4))
    assert drift.ks(reference, now) == pytest.approx(0.3)
    assert drift.psi(reference, reference * 7, 10)[0] == 0


def test_psi_of_a_bin_that_is_empty_is_finite():
    value, _ = drift.psi(np.array([50.0, 50]), np.array([0.0, 10]), 10)
    assert np.isfinite(value)
    assert value > 1


def test_psi_without_drift_is_about_what_is_expected():
    random = np.random.default_rng(5)
    n, m, bins = 500, 20_000, 10
    values = []
    for _ in range(300):
        reference, now = random.normal(size=m), random.normal(size=n)
        edges = np.quantile(reference, np.arange(1, 100) / 100)
        counts = [
            np.bincount(np.searchsorted(edges, v, side="right"), minlength=100).astype(float) for v in (reference, now)
        ]
        values.append(drift.psi(*counts, bins)[0])
    assert np.mean(values) == pytest.approx((bins - 1) * (1 / n + 1 / m), rel=0.15)


def test_a_feature_of_two_values_has_bins_that_are_not_empty():
    edges = [0.0, 1.0]
    counts = np.bincount(np.searchsorted(edges, [0] * 60 + [1] * 40, side="right"), minlength=3).astype(float)
    assert len({*drift.merged(counts, 10)[counts > 0]}) == 2
