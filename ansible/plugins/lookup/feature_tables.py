"""The tables that a feature repository needs: those of tables.yml, and those that follow from computed_views.yml."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: feature_tables
author: Larder
short_description: Tables that a feature repository needs
description:
  - Reads a repository's tables.yml, and computed_views.yml where it stands beside it, and judges both.
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

# The pipeline reads the same file with the same module.
MODULE = Path(__file__).resolve().parents[3] / "src/larder/features/definitions.py"

OWN = MODULE.parents[3] / "feature_repo/tables.yml"


def _definitions() -> Any:
    spec = spec_from_file_location("larder_definitions", MODULE)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LookupModule(LookupBase):  # type: ignore[misc] # Ansible is untyped
    """See DOCUMENTATION."""

    def run(self, terms: list[str], variables: Any = None, **_: Any) -> list[dict[str, Any]]:
        definitions = _definitions()
        found = []
        for term in terms:
            path = Path(self.find_file_in_search_path(variables or {}, "files", term) or term) if term else OWN
            try:
                declared = definitions.read_tables(path)
                made = definitions.read(path.parent).tables()
            except definitions.DefinitionError as error:
                raise AnsibleError(str(error)) from None
            schemas = [*declared["schemas"], *([definitions.SCHEMA] if made else [])]
            found.append({"schemas": list(dict.fromkeys(schemas)), "tables": [*declared["tables"], *made]})
        return found
