"""A metric file for node_exporter's textfile collector."""

from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

NAME = "pipeline.prom"
HELP = {
    "larder_pipeline_last_run_timestamp_seconds": "When the last run ended, well or not.",
    "larder_pipeline_last_success_timestamp_seconds": "When the last run that did all its stages ended; 0 if none did.",
    "larder_pipeline_success": "1 if the last run did all its stages.",
    "larder_pipeline_duration_seconds": "How long the last run took.",
    "larder_pipeline_stage_duration_seconds": "How long each stage of the last run took.",
    "larder_pipeline_bars_changed": "Bars that the last run added or corrected.",
    "larder_pipeline_bars_rejected": "Impossible bars that the last run met.",
    "larder_pipeline_files_refused": "Files that the last run could not understand.",
    "larder_pipeline_feature_rows_changed": "Feature rows that the last run wrote.",
    "larder_rejected_bars": "Impossible bars in market_data.rejected_bars.",
    "larder_newest_bar_timestamp_seconds": "Event time of the newest bar.",
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
    directory.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(directory / NAME), registry)
    (directory / NAME).chmod(0o644)  # the node exporter is another user
