"""The tables that a feature repository needs: of tables.yml, and those that follow from its views and its rules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: feature_tables
author: Larder
short_description: Tables that a feature repository needs
description:
  - Reads a repository's tables.yml, and computed_views.yml and quality.yml where they stand beside it, and judges all.
options:
  _terms:
    description: Path of tables.yml; an empty one is that of the stack's own repository.
    required: true
"""
EXAMPLES = """
- ansible.builtin.debug:
    msg: "{{ lookup('larder.stack.feature_tables', 'feature_repo/tables.yml').tables | map(attribute='name') }}"
"""
RETURN = """
_raw:
  description: One mapping with C(schemas) and C(tables), in the format of the module timescaledb_tables.
  type: list
  elements: dict
"""

# The pipeline reads the same files with the same modules.
SOURCE = Path(__file__).resolve().parents[3] / "src"
sys.path.append(str(SOURCE))

OWN = SOURCE.parent / "feature_repo/tables.yml"


class LookupModule(LookupBase):  # type: ignore[misc] # Ansible is untyped
    """See DOCUMENTATION."""

    def run(self, terms: list[str], variables: Any = None, **_: Any) -> list[dict[str, Any]]:
        from larder.features import definitions
        from larder.quality import rules

        found = []
        for term in terms:
            path = Path(self.find_file_in_search_path(variables or {}, "files", term) or term) if term else OWN
            try:
                declared = definitions.read_tables(path)
                views = definitions.read(path.parent)
                judged = rules.read(path.parent, views.features()).tables()
            except (definitions.DefinitionError, rules.RuleError) as error:
                raise AnsibleError(str(error)) from None
            made = views.tables()
            schemas = [*declared["schemas"], *([definitions.SCHEMA] if made else [])]
            schemas += [rules.SCHEMA] if judged else []
            found.append({"schemas": list(dict.fromkeys(schemas)), "tables": [*declared["tables"], *made, *judged]})
        return found
