"""Give secrets in an inventory's vault fresh random values, or missing secrets their first, on the controller.

Only the values change: the text around them, comments included, stays byte for byte, and the file is encrypted again
with the password that opened it. The former file, encrypted as it was, stays beside it with the suffix ``.former``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase

sys.path.append(str(Path(__file__).parents[1] / "module_utils"))

import larder_stack
import larder_vault


class ActionModule(ActionBase):  # type: ignore[misc] # ansible-core has no types
    """Takes ``path``, ``secrets`` (names; none means all but the CAs) and ``authority``, a new CA.

    With ``missing: true`` the plugin adds the secrets that the vault and the inventory lack instead. Returns the
    ``names`` of what was changed, those ``left`` because they are templates, and the ``certificates`` of all trusted
    CAs, which are public.
    """

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        variables = task_vars or {}
        super().run(tmp, variables)
        path, vault, arguments = Path(self._task.args["path"]).resolve(), self._loader._vault, self._task.args
        try:
            encrypted = path.read_bytes()
        except OSError as error:
            raise AnsibleActionFail(f"{path} cannot be read: {error.strerror}.") from None
        if not encrypted.startswith(b"$ANSIBLE_VAULT;"):
            raise AnsibleActionFail(f"{path} is not encrypted as a whole; ansible-vault encrypt does that.")
        try:
            text, vault_id, secret = vault.decrypt_and_get_vault_id(encrypted)
        except AnsibleError:
            raise AnsibleActionFail(f"The vault password that was given does not open {path}.") from None
        secrets = larder_stack.read().secrets
        left: list[str] = []
        try:
            old = text.decode()
            if arguments.get("missing"):
                there = self._elsewhere(variables)
                wanted = larder_stack.read().secrets_of(variables["groups"])
                new, names = larder_vault.completed(old, wanted, there, arguments["authority"])
            else:
                new, names, left = larder_vault.renewed(
                    old, secrets, arguments.get("secrets") or [], arguments["authority"]
                )
            certificates = larder_vault.certificates(new)
        except UnicodeDecodeError:
            raise AnsibleActionFail(f"Nothing was changed in {path}: it is no UTF-8.") from None
        except larder_vault.VaultError as error:
            raise AnsibleActionFail(f"Nothing was changed in {path}: {error}.") from None
        if names and not self._task.check_mode:
            self._replace(path, encrypted, vault.encrypt(new, secret=secret, vault_id=vault_id))
        return {"changed": bool(names), "names": names, "left": left, "certificates": certificates}

    def _elsewhere(self, variables: Mapping[str, Any]) -> list[str]:
        """Return the secrets that hosts of the inventory have, from whichever file."""
        found: set[str] = set()
        for host in {host for hosts in variables["groups"].values() for host in hosts}:
            held = variables["hostvars"].raw_get(host)
            if larder_vault.AUTHORITIES in held:
                found.add(larder_vault.AUTHORITIES)
            for name, secret in larder_stack.read().secrets.items():
                for purpose in secret.purposes:
                    # A template gives the secrets of all purposes.
                    if isinstance(held.get(name), str) or (
                        isinstance(held.get(name), Mapping) and held[name].get(purpose)
                    ):
                        found.add(f"{name}.{purpose}")
        return sorted(found)

    def _replace(self, path: Path, former: bytes, new: bytes) -> None:
        """Write the former file beside the vault, then replace the vault at once: a reader finds a complete file."""
        status = path.stat()
        for target, content in ((path.with_name(f"{path.name}.former"), former), (path, new)):
            temporary = path.with_name(f".{target.name}.new")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, status.st_mode & 0o777)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            if os.geteuid() == 0:
                os.chown(temporary, status.st_uid, status.st_gid)
            temporary.replace(target)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
