"""A metric file for node_exporter's textfile collector."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

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
        found = re.search(rf"^{metric} (\S+)$", (directory / NAME).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0.0
    return float(found[1]) if found else 0.0


def write(directory: Path, values: Mapping[str, float | Mapping[str, float]]) -> None:
    """Replace the file in one step, so that a scrape never sees half of it. A mapping is one sample per stage."""
    lines = []
    for metric, value in values.items():
        lines += [f"# HELP {metric} {HELP[metric]}", f"# TYPE {metric} gauge"]
        if isinstance(value, Mapping):
            lines += [f'{metric}{{stage="{stage}"}} {sample:.10g}' for stage, sample in value.items()]
        else:
            lines.append(f"{metric} {value:.15g}")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=directory, prefix=".", suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        file.write("\n".join(lines) + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(directory / NAME)
