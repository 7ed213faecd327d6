"""The rules of Prometheus as the role monitoring renders them, from its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/monitoring"
# What a run derives from the inventory.
DERIVED = {"__monitoring_synchronous": True, "larder_hosts": {"redis": {"cache1": "", "cache2": "", "cache3": ""}}}


def render(**variables: Any) -> dict[str, str]:
    """Return each file of rules by its name, with the role's defaults but for ``variables``."""
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    values: Mapping[str, Any] = {**DERIVED, **defaults, **variables}
    windows = [window[kind] for kind in ("short", "long") for window in values["monitoring_burn_windows"]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROLE / "templates/rules"),
        variable_start_string="<<",
        variable_end_string=">>",
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return {
        name.removesuffix(".j2"): environment.get_template(name).render(
            **values, __monitoring_windows=dict.fromkeys(windows)
        )
        for name in environment.list_templates()
    }


def alerts(files: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return every alert of the files."""
    return [
        rule
        for text in files.values()
        for group in yaml.safe_load(text)["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
