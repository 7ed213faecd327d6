"""Keep systemd encrypted credentials."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_credential
short_description: Keep systemd encrypted credentials
description:
  - Encrypts secrets with the host's key, so that only this host's root and the services that load them can read them.
  - Unlike C(community.general.systemd_creds_encrypt) it compares first - a credential that already decrypts to the
    wanted content is left alone - and neither the content nor its ciphertext is in the result.
options:
  credentials:
    description: >-
      Each has C(name), to which the credential is bound and which a unit's C(LoadCredentialEncrypted=) gives; C(path),
      the encrypted file; C(content), the secret; and may say with C(purpose) what it is for.
    type: list
    elements: dict
    required: true
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Encrypt the configuration of a service
  systemd_credential:
    credentials:
      - name: feature_store.yaml
        path: /etc/credstore.encrypted/serve.feature_store.yaml
        content: "{{ lookup('ansible.builtin.template', 'feature_store.yaml.j2') }}"
"""

RETURN = r"""
differing:
  description: Files of the credentials that were not as wanted; in check mode, those that would be encrypted anew.
  type: list
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


def keep(module: AnsibleModule, name: str, path: Path, content: str) -> bool:
    """Encrypt the content where the credential does not hold it yet; return whether anything was not as wanted."""
    changed = decrypted(module, name, path) != content
    if changed and not module.check_mode:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        encrypt(module, name, path, content)
    # In check mode there may be no file.
    return bool(module.set_mode_if_different(str(path), 0o600, changed)) if path.exists() else changed


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "credentials": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True, "no_log": True},
                    "purpose": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    differing = [
        each["path"]
        for each in module.params["credentials"]
        if keep(module, each["name"], Path(each["path"]), each["content"])
    ]
    module.exit_json(changed=bool(differing), differing=differing)


if __name__ == "__main__":
    main()
