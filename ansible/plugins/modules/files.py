"""Write files and make directories, many in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: files
short_description: Write files and make directories, many in one call
description:
  - What C(ansible.builtin.template), C(ansible.builtin.copy) and C(ansible.builtin.file) do, with the same check mode
    and diff, for all the files of a role at once. Those start a Python on the host twice for each file that is as it
    should be; most of a run that changes nothing is spent there.
  - Files are written in the order of the list. A reader sees the former file or the new one.
options:
  files:
    description: >-
      Each is a file with C(content), or a directory; missing parents of a directory are made too. C(owner) and C(group)
      are root and C(mode) is 0644, or 0755 of a directory. C(validate) is a command with C(%s) for the new file, which
      is not put in place if the command fails.
    type: list
    elements: dict
    required: true
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Harden a unit
  files:
    files:
      - path: /etc/systemd/system/redis-server.service.d
      - path: /etc/systemd/system/redis-server.service.d/hardening.conf
        content: "{{ lookup('ansible.builtin.template', 'hardening.conf.j2') }}"
"""

RETURN = r"""
changed_paths:
  description: Files and directories that were changed, or in check mode would be.
  type: list
  returned: always
"""

import shlex  # noqa: E402 - the documentation stands first, as Ansible asks
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def write(module: AnsibleModule, path: Path, content: str, validate: str | None) -> None:
    """Put a file with the content in place, if the command finds nothing wrong with it."""
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent} is no directory")
    temporary = Path(module.tmpdir, "new")
    temporary.touch(mode=0o600)
    temporary.write_text(content, encoding="utf-8")
    if validate:
        command = [word.replace("%s", str(temporary)) for word in shlex.split(validate)]
        code, out, err = module.run_command(command)
        if code != 0:
            module.fail_json(msg=f"{path} was not written, because {command[0]} refuses it: {(err or out).strip()}")
    module.atomic_move(str(temporary), str(path))


def put(module: AnsibleModule, wanted: dict[str, Any]) -> tuple[bool, dict[str, str]]:
    """Make one file or directory as wanted; return whether it was not, and the difference of its content."""
    path, content = Path(wanted["path"]), wanted["content"]
    diff = {}
    if content is None:
        changed = not path.is_dir()
        if changed and not module.check_mode:
            for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
                missing.mkdir()
                missing.chmod(0o755)  # whatever the umask is
    else:
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        changed = before != content
        if changed:
            diff = {"before": before or "", "after": content, "before_header": str(path), "after_header": str(path)}
            if not module.check_mode:
                write(module, path, content, wanted["validate"])
    if path.exists():  # in check mode it may not
        mode = wanted["mode"] or ("0755" if content is None else "0644")
        changed = module.set_owner_if_different(str(path), wanted["owner"], changed)
        changed = module.set_group_if_different(str(path), wanted["group"], changed)
        changed = module.set_mode_if_different(str(path), mode, changed)
    return changed, diff


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str"},
                    "validate": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    changed_paths: list[str] = []
    diffs: list[dict[str, str]] = []
    for wanted in module.params["files"]:
        try:
            changed, diff = put(module, wanted)
        except (OSError, ValueError) as error:
            module.fail_json(msg=f"{wanted['path']}: {error}", changed_paths=changed_paths)
        if changed:
            changed_paths.append(wanted["path"])
            diffs += [diff] if diff and module._diff else []
    module.exit_json(changed=bool(changed_paths), changed_paths=changed_paths, diff=diffs)


if __name__ == "__main__":
    main()
