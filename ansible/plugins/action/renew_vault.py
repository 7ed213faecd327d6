"""Give secrets in an inventory's vault fresh random values, on the controller.

Only the values change: the text around them, comments included, stays byte for byte, and the file is encrypted again
with the password that opened it. The former file, encrypted as it was, stays beside it with the suffix ``.former``.
"""

from __future__ import annotations

import os
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from cryptography import x509

AUTHORITIES = "certificate_authorities"
GENERATION = "certificate_generation"
TOKENS = "gateway_tokens"
ALPHABET = string.ascii_letters + string.digits
LENGTH = 40
Change = tuple[int, int, str]  # from, to, what stands there instead


def fresh() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))


def parse(text: str) -> yaml.MappingNode:
    """Return the nodes of a vault's text, which know where they stand in it."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("the vault holds no variables")
    return root


def names(root: yaml.MappingNode) -> dict[str, yaml.Node]:
    """Return every secret by its name: ``redis_passwords.serve``, and the authorities as one."""
    found: dict[str, yaml.Node] = {}
    for key, value in root.value:
        if isinstance(value, yaml.MappingNode):
            found |= {f"{key.value}.{purpose.value}": secret for purpose, secret in value.value}
        elif key.value in {AUTHORITIES, GENERATION}:
            found[key.value] = value
    return found


def choose(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the names that are meant, each a variable or one of its purposes; by default all but the authorities."""
    if not wanted:
        return [name for name in known if name != AUTHORITIES]
    chosen = []
    for want in wanted:
        meant = [name for name in known if name == want or name.startswith(f"{want}.")]
        if not meant:
            raise ValueError(f"secrets holds {want}; the vault has {', '.join(known)}")
        chosen += meant
    return chosen


def plain(node: yaml.Node) -> Any:
    """Return a node as dictionaries, lists and texts, whatever its tags."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    return node.value


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def tokens(node: yaml.Node) -> str:
    """Return a fresh token, and the one that was current as the second."""
    current = node.value[0] if isinstance(node, yaml.SequenceNode) else node
    return f"[{fresh()}, {quoted(current.value)}]"


def authorities(node: yaml.Node, new: Mapping[str, str]) -> list[Mapping[str, str]]:
    """Return the next step of changing the authority: a new one is trusted, then signs, then the old one is gone."""
    present: list[Mapping[str, str]] = plain(node)
    if len(present) == 1:
        return [*present, new]
    first, second = (x509.load_pem_x509_certificate(entry["certificate"].encode()) for entry in present[:2])
    if first.not_valid_before_utc <= second.not_valid_before_utc:
        return [present[1], present[0], *present[2:]]
    return present[:1]


def block(entries: Sequence[Mapping[str, str]], column: int) -> str:
    """Return the entries as YAML whose first line stands at a column."""
    lines: list[str] = []
    for entry in entries:
        for number, (name, value) in enumerate(entry.items()):
            lines.append(f"{'- ' if number == 0 else '  '}{name}: |")
            lines += [f"    {line}" for line in value.strip().splitlines()]
    return ("\n" + " " * column).join(lines) + "\n"


def last_scalar(node: yaml.Node) -> yaml.ScalarNode:
    while not isinstance(node, yaml.ScalarNode):
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return node


def changes(text: str, chosen: Sequence[str], new: Mapping[str, str]) -> Iterator[Change]:
    found = names(parse(text))
    for name in chosen:
        node = found[name]
        start, end = node.start_mark.index, node.end_mark.index
        if name == AUTHORITIES:
            yield start, last_scalar(node).end_mark.index, block(authorities(node, new), node.start_mark.column)
        elif name == GENERATION:
            yield start, end, str(int(node.value) + 1)
        else:
            value = tokens(node) if name.startswith(f"{TOKENS}.") else fresh()
            # A block scalar ends with its line.
            yield start, end, value + "\n" * text[start:end].endswith("\n")


def renew(text: str, chosen: Sequence[str], new: Mapping[str, str]) -> str:
    """Return the vault's text with fresh values for the chosen secrets and nothing else changed."""
    before = parse(text)
    for start, end, value in sorted(changes(text, chosen, new), reverse=True):
        text = text[:start] + value + text[end:]
    after = parse(text)

    def others(root: yaml.MappingNode) -> dict[str, Any]:
        return {name: plain(node) for name, node in names(root).items() if name not in chosen}

    if names(before).keys() != names(after).keys() or others(before) != others(after):
        raise ValueError("the vault is written in a way that cannot be edited safely; use ansible-vault edit")
    return text


class ActionModule(ActionBase):  # type: ignore[misc] # ansible-core has no types
    """Takes ``path``, ``secrets`` (names; none means all but the authorities) and ``authority``, a new one.

    Returns the names of what was changed, and all trusted authorities' ``certificates``, which are public.
    """

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars or {})
        path, vault = Path(self._task.args["path"]), self._loader._vault
        encrypted = path.read_bytes()
        if not encrypted.startswith(b"$ANSIBLE_VAULT;"):
            raise AnsibleActionFail(f"{path} is not encrypted as a whole; ansible-vault encrypt does that.")
        try:
            text, vault_id, secret = vault.decrypt_and_get_vault_id(encrypted)
        except AnsibleError:
            raise AnsibleActionFail(f"The vault password that was given does not open {path}.") from None
        old = text.decode()
        try:
            chosen = choose(list(names(parse(old))), self._task.args.get("secrets") or [])
            new = renew(old, chosen, self._task.args["authority"])
        except ValueError as error:
            raise AnsibleActionFail(f"Nothing was changed: {error}.") from None
        if not self._task.check_mode:
            self._replace(path, encrypted, vault.encrypt(new, secret=secret, vault_id=vault_id))
        trusted = plain(parse(new)).get(AUTHORITIES, [])
        return {"changed": True, "names": chosen, "certificates": [entry["certificate"] for entry in trusted]}

    def _replace(self, path: Path, former: bytes, new: bytes) -> None:
        """Write the former file beside, then the new one in its place: whoever reads finds one of the two, whole."""
        for target, content in ((path.with_name(f"{path.name}.former"), former), (path, new)):
            temporary = path.with_name(f".{target.name}.new")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, path.stat().st_mode & 0o777)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            temporary.replace(target)
