"""Tables that are made of what the roles declare are current, and every role's README has its variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import tables

DOCUMENTS = [*tables.ROOT.glob("roles/*/README.md"), tables.ROOT / "docs/own-roles.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(tables.ROOT)))
def test_a_table_is_current(document: Path) -> None:
    assert document in tables.documents(), "it has no table; docs/own-roles.md says how"
    assert document.read_text() == tables.current(document), "run python tests/shared/tables.py"
