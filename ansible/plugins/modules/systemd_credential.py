"""Keep a systemd encrypted credential."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_credential
short_description: Keep a systemd encrypted credential
description:
  - Encrypts a secret with the host's key, so that only this host's root and the services that load it can read it.
  - Unlike C(community.general.systemd_creds_encrypt) it compares first - a credential that already decrypts to the
    wanted content is left alone - and neither the content nor its ciphertext is in the result.
options:
  name:
    description: Name to which the credential is bound; the one that a unit's C(LoadCredentialEncrypted=) gives.
    type: str
    required: true
  path:
    description: File of the encrypted credential.
    type: path
    required: true
  content:
    description: The secret. Required when I(state=present).
    type: str
  state:
    description: Whether the credential exists.
    type: str
    choices: [present, absent]
    default: present
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Encrypt the configuration of a service
  systemd_credential:
    name: feature_store.yaml
    path: /etc/credstore.encrypted/serve.feature_store.yaml
    content: "{{ lookup('ansible.builtin.template', 'feature_store.yaml.j2') }}"
"""

RETURN = r"""
path:
  description: File of the encrypted credential.
  type: str
  returned: always
differs:
  description: Whether the credential was not as wanted; for a task that only asks, in check mode.
  type: bool
  returned: always
"""

from pathlib import Path  # noqa: E402 - the documentation stands first, as Ansible asks

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def decrypted(module: AnsibleModule, name: str, path: Path) -> str | None:
    """Return what the credential holds, or None where it is missing or this host's key cannot open it."""
    if not path.exists():
        return None
    rc, out, _ = module.run_command(["systemd-creds", "decrypt", f"--name={name}", str(path), "-"])
    return out if rc == 0 else None


def encrypt(module: AnsibleModule, name: str, path: Path, content: str) -> None:
    """Write the encrypted content at once: a reader sees the old file or the new one."""
    rc, out, err = module.run_command(
        ["systemd-creds", "encrypt", "--with-key=host", f"--name={name}", "-", "-"], data=content, binary_data=True
    )
    if rc != 0:
        module.fail_json(msg=f"systemd-creds could not encrypt {name}: {err.strip()}")
    temporary = Path(module.tmpdir, "credential")
    temporary.write_text(out, encoding="ascii")
    module.atomic_move(str(temporary), str(path))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "content": {"type": "str", "no_log": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ["content"])],
        supports_check_mode=True,
    )
    name, path, content = module.params["name"], Path(module.params["path"]), module.params["content"]
    if module.params["state"] == "absent":
        changed = path.exists()
        if changed and not module.check_mode:
            path.unlink()
    else:
        changed = decrypted(module, name, path) != content
        if changed and not module.check_mode:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            encrypt(module, name, path, content)
        if path.exists():  # in check mode it may not
            changed = module.set_mode_if_different(str(path), 0o600, changed)
    module.exit_json(changed=changed, differs=changed, path=str(path))


if __name__ == "__main__":
    main()
