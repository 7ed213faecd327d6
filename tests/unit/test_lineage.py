"""What OpenLineage events cannot do to a run."""

from pathlib import Path
from typing import Any

import pytest

from larder.operations.credentials import Credentials
from larder.operations.lineage import Lineage


def test_an_event_that_cannot_be_made_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project, which names the jobs, is in feature_store.yaml: here there is none."""
    monkeypatch.setenv("LARDER_OPENLINEAGE_URL", "http://127.0.0.1:1")
    connection: Any = None
    lineage = Lineage(Credentials(tmp_path), tmp_path, connection)
    ran = []
    with lineage.job("pipeline"), lineage.job("load"):
        ran.append("load")
    assert ran == ["load"]
    assert lineage.parents == []
    assert lineage.report() == {"larder_pipeline_lineage_sent": 0, "larder_pipeline_lineage_lost": 4}
