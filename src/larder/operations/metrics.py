"""Metric files for node_exporter's textfile collector: of the last run, and of what `larder status` found."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

from larder.operations.facts import Fact, State

NAME, FACTS_NAME = "pipeline.prom", "status.prom"
HELP = {
    "larder_pipeline_last_run_timestamp_seconds": "When the last run ended, well or not.",
    "larder_pipeline_last_success_timestamp_seconds": "When the last run that did all its stages ended; 0 if none did.",
    "larder_pipeline_success": "1 if the last run did all its stages.",
    "larder_pipeline_duration_seconds": "How long the last run took.",
    "larder_pipeline_stage_duration_seconds": "How long each stage of the last run took.",
    "larder_pipeline_bars_changed": "Bars that the last run added or corrected.",
    "larder_pipeline_bars_rejected": "Impossible bars that the last run met.",
    "larder_pipeline_bars_quarantined": "Bars of the last run's files that are in quarantine.",
    "larder_pipeline_files_refused": "Files that the last run could not understand.",
    "larder_pipeline_feature_rows_changed": "Feature rows that the last run wrote.",
    "larder_pipeline_lineage_sent": "OpenLineage events of the last run that the receiver has taken.",
    "larder_pipeline_lineage_lost": "OpenLineage events of the last run that the receiver has not taken.",
    "larder_rejected_bars": "Impossible bars in market_data.rejected_bars.",
    "larder_newest_bar_timestamp_seconds": "Event time of the newest bar.",
}
STATES = {State.OK: 0, State.WARNING: 1, State.FAILED: 2, State.UNKNOWN: 3}
FACTS_HELP = {
    "last_run_age_seconds": "Since the last run of the pipeline ended, or began if it has not ended.",
    "refused_files": "Files that are refused.",
    "pending_symbols": "Symbols that wait to be computed.",
    "rejected_bars": "Impossible bars in market_data.rejected_bars.",
    "newest_day_symbols_ratio": "Symbols with a bar of the newest day, by the median of the days before.",
    "feature_age_seconds": "Age of the newest row of a view.",
    "registry_lost_objects": "Objects or features that were applied and are no longer in the registry.",
    "materialization_age_seconds": "Since the view that was materialized longest ago was.",
    "online_complete_ratio": "Share of a view's entities whose newest row the online store has.",
    "online_read_seconds": "Median time to read all features of one entity.",
    "redis_evicted_keys": "Keys that Redis has evicted since the last materialization began.",
    "quarantined_bars": "Bars in quarantine, which no feature uses.",
    "quality_findings": "What a rule of quality.yml found: now, or at a load of the last seven days.",
    "quality_check_age_seconds": "Since days and features were judged by the rules.",
    "drifted_features_ratio": "Share of features that have moved away from their references.",
    "verified_wrong_values": "Served values of the last sample that are not what the bars give.",
    "skewed_served_values": "Values of the last samples of what clients were served that the history has otherwise.",
    "standby_behind_bytes": "WAL that a database standby has not confirmed.",
    "backup_proven_age_seconds": "Age of the newest backup that a restore has proven.",
    "certificate_remaining_seconds": "Until a certificate of this host ends.",
}

DRIFT_HELP = {
    "psi": "Population stability index of the newest window against the reference.",
    "psi_expected": "What it is about without drift, of so few symbols.",
    "ks": "Kolmogorov-Smirnov distance of the newest window from the reference.",
    "null_ratio": "Share of nulls in the newest window.",
    "mean": "Mean of the newest window, scaled as quality.yml says.",
    "deviation": "Standard deviation of the newest window.",
    "moved": "1 if the feature has moved away from its reference.",
}


def read(directory: Path, metric: str) -> float:
    """A metric of the last run, 0 where there is none."""
    try:
        families = text_string_to_metric_families((directory / NAME).read_text(encoding="utf-8"))
        samples = {sample.name: sample.value for family in families for sample in family.samples}
    except (OSError, ValueError):
        return 0.0
    return samples.get(metric, 0.0)


def write(directory: Path, values: Mapping[str, float | Mapping[str, float]]) -> None:
    """Replace the file in one step, so that a scrape never sees half of it. A mapping is one sample per stage."""
    registry = CollectorRegistry()
    for metric, value in values.items():
        if isinstance(value, Mapping):
            gauge = Gauge(metric, HELP[metric], ["stage"], registry=registry)
            for stage, sample in value.items():
                gauge.labels(stage).set(sample)
        else:
            Gauge(metric, HELP[metric], registry=registry).set(value)
    _replace(directory / NAME, registry)


def write_facts(directory: Path, facts: Sequence[Fact]) -> None:
    """Write each fact's value, its state, and whether all is well."""
    registry = CollectorRegistry()
    for name in dict.fromkeys(fact.name for fact in facts):
        gauge = Gauge(f"larder_status_{name}", FACTS_HELP[name], ["of"], registry=registry)
        for fact in facts:
            if fact.name == name and fact.value is not None:
                gauge.labels(fact.of).set(fact.value)
    said = "State of a fact: 0 ok, 1 warning, 2 failed, 3 unknown; larder status has the sentence."
    state = Gauge("larder_status_state", said, ["fact", "of"], registry=registry)
    for fact in facts:
        state.labels(fact.name, fact.of).set(STATES[fact.state])
    healthy = Gauge("larder_status_healthy", "1 if no fact has failed.", registry=registry)
    healthy.set(all(fact.state != State.FAILED for fact in facts))
    Gauge("larder_status_timestamp_seconds", "When this was found.", registry=registry).set(time.time())
    _replace(directory / FACTS_NAME, registry)


def write_quality(directory: Path, quarantined: int, findings: Mapping[tuple[str, str], int]) -> None:
    """Write how many bars are in quarantine, and how many findings there are by rule and severity."""
    registry = CollectorRegistry()
    Gauge("larder_quarantined_bars", "Bars in quarantine, which no feature uses.", registry=registry).set(quarantined)
    said = "What a rule finds now after compute, or found at a load of the last seven days."
    gauge = Gauge("larder_quality_findings", said, ["rule", "severity"], registry=registry)
    for (rule, severity), count in findings.items():
        gauge.labels(rule, severity).set(count)
    Gauge("larder_quality_timestamp_seconds", "When days and features were judged.", registry=registry).set(time.time())
    _replace(directory / "quality.prom", registry)


def write_drift(directory: Path, judged: Sequence[Any]) -> None:
    """Write what operations.drift judged of the newest day."""
    registry = CollectorRegistry()
    labels = ["view", "feature", "symbols"]
    for name, said in DRIFT_HELP.items():
        gauge = Gauge(f"larder_feature_{name}", said, labels, registry=registry)
        for one in judged:
            if (value := getattr(one, name)) is not None:
                gauge.labels(one.view, one.feature, one.symbols).set(value)
    Gauge("larder_drift_timestamp_seconds", "When drift was judged.", registry=registry).set(time.time())
    _replace(directory / "drift.prom", registry)


def write_verified(directory: Path, symbols: int, values: int, wrong: int, skipped: int) -> None:
    """Write what a verification of served values found."""
    registry = CollectorRegistry()
    for name, said, value in (
        ("values", "Served values that the last verification computed again.", values),
        ("wrong_values", "Those of them that are not what the bars give.", wrong),
        ("symbols", "Symbols of these values.", symbols),
        ("skipped_symbols", "Symbols of the sample that were about to change, or not served.", skipped),
        ("timestamp_seconds", "When served values were verified.", time.time()),
    ):
        Gauge(f"larder_verified_{name}", said, registry=registry).set(value)
    _replace(directory / "verify.prom", registry)


def write_skew(directory: Path, told: Any) -> None:
    """Write what a comparison of served values with the history found."""
    registry = CollectorRegistry()
    said = "Sampled values that clients were served, by how they compare with a point-in-time join."
    gauge = Gauge("larder_skew_values", said, ["view", "feature", "result"], registry=registry)
    for name, of in told.counts.items():
        view, _, feature = name.partition(":")
        for result, count in of.items():
            gauge.labels(view, feature, result).set(count)
    for name, said, value in (
        ("samples", "Samples of the last comparison.", told.samples),
        ("silent_instances", "Feature servers that did not tell what they served.", len(told.silent)),
        ("timestamp_seconds", "When served values were compared with the history.", time.time()),
    ):
        Gauge(f"larder_skew_{name}", said, registry=registry).set(value)
    _replace(directory / "skew.prom", registry)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.chmod(0o644)
    part.replace(path)


def _replace(path: Path, registry: CollectorRegistry) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), registry)
    path.chmod(0o644)  # the node exporter is another user
