"""Read every vault before Ansible does, and say what is wrong with one without quoting it.

Where a vault's YAML is wrong, Ansible's own message quotes the unknown tag, the doubled name or the bad number: a
password that begins with an exclamation mark would be on the screen. This plugin gives no variables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError, AnsibleParserError
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.vars import BaseVarsPlugin

sys.path.append(str(Path(__file__).parents[1] / "module_utils"))

import larder_vault

DOCUMENTATION = """
name: larder_vault_check
short_description: Check vaults before Ansible reads them
description: Says where a vault's YAML is wrong, and nothing of what it holds.
options: {}
"""


class VarsModule(BaseVarsPlugin):  # type: ignore[misc] # ansible-core has no types
    REQUIRES_ENABLED = True
    # One instance for the whole run: otherwise Ansible makes a new one whenever it needs a host's variables, and each
    # parses every vault again.
    is_stateless = True

    def __init__(self) -> None:
        super().__init__()
        self.checked: set[Path] = set()

    def get_vars(self, loader: DataLoader, path: str, entities: Iterable[Any]) -> dict[str, Any]:
        super().get_vars(loader, path, entities)
        place = Path(path)
        if place not in self.checked:
            for file in sorted({*place.glob("group_vars/**/*"), *place.glob("host_vars/**/*")}):
                if file.suffix in {".yml", ".yaml", ".json", ""} and file.is_file():
                    self._check(loader, file)
            # After the check: a vault that was refused is refused again, and Ansible never comes to quote it.
            self.checked.add(place)
        return {}

    def _check(self, loader: DataLoader, file: Path) -> None:
        try:
            content = file.read_bytes()
            if not content.startswith(b"$ANSIBLE_VAULT;"):
                return
            text = loader._vault.decrypt(content).decode()
        except (AnsibleError, OSError, UnicodeDecodeError):
            return  # Ansible itself reports this, and has nothing to quote
        try:
            larder_vault.parse(text)
        except RecursionError:
            raise AnsibleParserError(f"{file} cannot be read: it is nested too deeply.") from None
        except larder_vault.VaultError as error:
            raise AnsibleParserError(f"{file} cannot be read: {error}. ansible-vault edit shows it.") from None
