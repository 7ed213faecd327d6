"""The text of a vault: read its secrets, and change single values without changing anything else.

A change is made in the text, at the place that YAML's own parser gives, so comments, quotes and order stay byte for
byte. Then the text is parsed again and compared with the expected result: where the two differ, nothing is changed. A
message holds nothing of a vault but names that are public anyway.
"""

from __future__ import annotations

import copy
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from cryptography import x509
from yaml.constructor import SafeConstructor

import larder_stack

AUTHORITIES = "certificate_authorities"
GENERATION = "certificate_generation"
ALPHABET = string.ascii_letters + string.digits
LENGTH = 40
TEXT, MERGE, NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "null"))
# Ansible's own tags of texts.
TAGS = {"!unsafe", "!vault", "!vault-encrypted"}
# A passphrase, such as that of an archive, is given away once and cannot be changed afterwards.
NEVER = "passphrase"

Secrets = Mapping[str, larder_stack.Secret]  # by variable
Tree = Any  # a dictionary, a list, or a scalar as (tag, text)
Edit = tuple[int, int, str]  # from, to, what stands there instead


class VaultError(ValueError):
    """The vault cannot be read or changed: one sentence, without a secret."""


class Loader(yaml.SafeLoader):
    """Composes nodes where an alias has a place of its own in the text, and ``of``, the node that it stands for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call] # types-pyyaml has none
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            alias: Any = copy.copy(node)
            alias.of, alias.start_mark, alias.end_mark = node, event.start_mark, event.end_mark
            return alias
        return node


def place(mark: yaml.Mark | None) -> str:
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def parse(text: str) -> yaml.MappingNode:
    """Return the nodes of a vault's text; an empty one is a dictionary without entries."""
    try:
        root = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        # The parser's own message is not used: it quotes the line.
        several = isinstance(error, yaml.composer.ComposerError) and "single document" in str(error.context)
        what = "holds more than one document" if several else "is no valid YAML"
        raise VaultError(f"it {what}{place(error.problem_mark or error.context_mark)}") from None
    except yaml.YAMLError:
        raise VaultError("it holds a character that YAML does not allow") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == NULL):
        end = yaml.Mark("", len(text), text.count("\n"), 0, None, 0)
        return yaml.MappingNode("tag:yaml.org,2002:map", [], end, end, flow_style=False)
    if not isinstance(root, yaml.MappingNode):
        raise VaultError("it holds no variables: a vault is a dictionary of them")
    check(root, ())
    return root


def check(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    """Refuse what Ansible refuses or misunderstands: Ansible's own message would quote the text."""
    if (of := getattr(node, "of", None)) is not None:
        if of in above:
            raise VaultError(f"an alias{place(node.start_mark)} stands for what it is in")
        return
    if isinstance(node, yaml.ScalarNode):
        try:
            if node.tag not in {*TAGS, MERGE}:
                SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ArithmeticError, LookupError, ValueError):
            raise VaultError(
                f"the value{place(node.start_mark)} is not what its form or its tag says; quotes make a text of it"
            ) from None
        return
    if not node.tag.startswith("tag:yaml.org,2002:"):
        raise VaultError(f"the tag{place(node.start_mark)} is unknown")
    keys = set()
    for item in node.value:
        for part in item if isinstance(node, yaml.MappingNode) else [item]:
            check(part, (*above, node))
        if isinstance(node, yaml.MappingNode):
            key = item[0]
            if not isinstance(key, yaml.ScalarNode):
                raise VaultError(f"the name{place(key.start_mark)} is no text")
            if key.value in keys and key.tag != MERGE:
                raise VaultError(f"the name{place(key.start_mark)} stands twice in its dictionary")
            keys.add(key.value)


def entries(node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, bool]]:
    """Return a dictionary's values by name, and whether each is its own, not one that ``<<`` brings."""
    own: dict[str, tuple[yaml.Node, bool]] = {}
    merged: dict[str, tuple[yaml.Node, bool]] = {}
    for key, value in node.value:
        if key.tag != MERGE:
            own[key.value] = (value, True)
            continue
        for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(source, yaml.MappingNode):
                raise VaultError(f"what << brings{place(value.start_mark)} is no dictionary")
            merged = {name: (held, False) for name, (held, _) in entries(source).items()} | merged
    return merged | own


def tree(node: yaml.Node) -> Tree:
    """Return what a node means: aliases and ``<<`` as what they stand for, and each scalar with its tag."""
    if isinstance(node, yaml.MappingNode):
        return {name: tree(value) for name, (value, _) in entries(node).items()}
    if isinstance(node, yaml.SequenceNode):
        return [tree(item) for item in node.value]
    return node.tag, node.value


def nodes(held: Tree) -> yaml.Node:
    """Return nodes that mean a tree, in flow style."""
    if isinstance(held, dict):
        pairs = [(nodes((TEXT, name)), nodes(value)) for name, value in held.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=True)
    if isinstance(held, list):
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [nodes(item) for item in held], flow_style=True)
    tag, value = held
    plain = (value.isascii() and value.isalnum()) or (tag.startswith("tag:") and tag != TEXT)
    style = None if plain else '"' if "\n" in value else "'"
    return yaml.ScalarNode(tag, value, style=style)


def flow(held: Tree) -> str:
    """Return a tree as YAML in one line, which may stand anywhere."""
    text = yaml.serialize(nodes(held), width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def block(entries_: list[Tree], column: int) -> str:
    """Return a list as YAML in lines, of which the first stands at a column."""

    def lines(node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode):
            node.style = "|" if "\n" in node.value else node.style
        else:
            node.flow_style = False
            for item in node.value:
                for part in item if isinstance(node, yaml.MappingNode) else [item]:
                    lines(part)
        return node

    text = yaml.serialize(lines(nodes(entries_)), width=float("inf"), allow_unicode=True)
    return text.rstrip("\n").replace("\n", "\n" + " " * column)


def fresh() -> str:
    """Return a secret that YAML takes for a text whatever stands around it."""
    return secrets.choice(string.ascii_letters) + "".join(secrets.choice(ALPHABET) for _ in range(LENGTH - 1))


def is_template(node: yaml.Node) -> bool:
    return (
        isinstance(node, yaml.ScalarNode) and node.tag not in TAGS and any(mark in node.value for mark in ("{{", "{%"))
    )


def is_empty(node: yaml.Node) -> bool:
    return node.tag == NULL or (isinstance(node, yaml.ScalarNode | yaml.SequenceNode) and not node.value)


class Vault:
    """A vault's text, and what is to be changed in it."""

    def __init__(self, text: str, declared: Secrets) -> None:
        """Take the text, and the secrets that the roles declare."""
        self.text, self.root = text, parse(text)
        self.declared = declared
        self.expected: dict[str, Tree] = tree(self.root)
        self.edits: list[Edit] = []
        # Text to insert before the first entry of a dictionary, and whole variables to add at the end.
        self.added: dict[int, tuple[yaml.MappingNode, dict[str, Tree]]] = {}
        self.variables: dict[str, Tree] = {}

    def known(self) -> list[str]:
        """Return the names of all secrets, whether the vault has them or not."""
        return [f"{name}.{purpose}" for name, secret in self.declared.items() for purpose in secret.purposes] + [
            GENERATION,
            AUTHORITIES,
        ]

    def find(self, name: str) -> yaml.Node | None:
        """Return a secret's node; None where the vault has none, or an empty one."""
        variable, _, purpose = name.partition(".")
        node = entries(self.root).get(variable, (None, True))[0]
        if node is None or is_empty(node):
            return None
        if purpose and not is_template(node):
            if not isinstance(node, yaml.MappingNode):
                raise VaultError(f"{variable} is no dictionary in the vault, and must be one by purpose")
            node = entries(node).get(purpose, (None, True))[0]
        return None if node is None or is_empty(node) else node

    def choose(self, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the secrets that are meant, by default all that may change, and those that are left as templates."""
        present = {name: node for name in self.known() if NEVER not in name and (node := self.find(name)) is not None}
        chosen = [name for name in present if name != AUTHORITIES]
        if wanted:
            chosen = []
            for want in wanted:
                if NEVER in want:
                    raise VaultError("a passphrase opens what was closed with it, and is never made anew")
                meant = [name for name in present if name == want or name.startswith(f"{want}.")]
                if not meant:
                    raise VaultError(
                        f"secrets has a name that is none of the vault's; it has {', '.join(present) or 'none'}"
                    )
                chosen += [name for name in meant if name not in chosen]
        left = [name for name in chosen if is_template(present[name])]
        if wanted and left:
            raise VaultError(f"{left[0]} is a template: make what it refers to anew")
        return [name for name in chosen if name not in left], left

    def renew(self, name: str, authority: Mapping[str, str]) -> None:
        """Give a secret that is there its next value."""
        node = self.find(name)
        assert node is not None
        if name == AUTHORITIES:
            self.set(name, authorities(tree(node), authority))
        elif name == GENERATION:
            if not isinstance(node, yaml.ScalarNode) or not node.value.isdecimal():
                raise VaultError(f"{GENERATION} is no whole number in the vault")
            self.set(name, (node.tag, str(int(node.value) + 1)))
        elif not self.declared[name.partition(".")[0]].two:
            self.set(name, (TEXT, fresh()))
        else:
            current = node.value[0] if isinstance(node, yaml.SequenceNode) and node.value else node
            if not isinstance(current, yaml.ScalarNode):
                raise VaultError(f"{name} holds no token in the vault: a text, or a list of one or two")
            self.set(name, [(TEXT, fresh()), tree(current)])

    def add(self, name: str, authority: Mapping[str, str]) -> None:
        """Give a secret that is missing its first value."""
        if name == AUTHORITIES:
            self.set(name, authorities([], authority))
        else:
            self.set(name, (TEXT, fresh()))

    def set(self, name: str, value: Tree) -> None:
        """Note what a secret is to be, and where the text says so."""
        variable, _, purpose = name.partition(".")
        held, own = entries(self.root).get(variable, (None, False))
        if purpose:
            changed = self.expected.get(variable)
            self.expected[variable] = {**(changed if isinstance(changed, dict) else {}), purpose: value}
        else:
            self.expected[variable] = value
        if held is None or not own:
            self.variables[variable] = self.expected[variable]
        elif not purpose or not isinstance(held, yaml.MappingNode) or hasattr(held, "of") or not held.value:
            self.replace(held, self.expected[variable])
        else:
            node, own = entries(held).get(purpose, (None, False))
            if node is not None and own:
                self.replace(node, value)
            else:
                self.added.setdefault(held.start_mark.index, (held, {}))[1][purpose] = value

    def replace(self, node: yaml.Node, value: Tree) -> None:
        """Put a value where a node stands, in the node's own style as far as it can hold it."""
        start, end = node.start_mark.index, self.end(node)
        self.edits = [edit for edit in self.edits if edit[0] != start]  # a dictionary that is written again, as a whole
        style = getattr(node, "style", None) or ""
        items = (
            node.value
            if isinstance(node, yaml.SequenceNode) and not node.flow_style and not hasattr(node, "of")
            else []
        )
        if items and isinstance(value, list) and isinstance(items[0], yaml.ScalarNode):
            # A list of tokens, one a line.
            first = items[0]
            self.edits.append((first.start_mark.index, self.end(first), value[0][1]))
            if len(items) > 1:
                self.edits.append((items[1].start_mark.index, self.end(items[-1]), flow(value[1])))
            else:
                column = first.start_mark.column - (
                    first.start_mark.index - self.text.rindex("-", 0, first.start_mark.index)
                )
                extra = f"{value[0][1]}\n{' ' * column}- {flow(value[1])}"
                self.edits[-1] = (*self.edits[-1][:2], extra)
            return
        if items and isinstance(value, list):
            new = block(value, node.start_mark.column)
        elif isinstance(value, tuple) and value[0] == TEXT and value[1].isalnum():
            new = f"{style}{value[1]}{style}" if style in ("'", '"') else value[1]
        else:
            new = flow(value)
        if start == end:
            new = f" {new}" if self.text[:start].endswith(":") else f": {new}"
        self.edits.append((start, end, new))

    def end(self, node: yaml.Node) -> int:
        """Return where a node ends, without the white space after it that the parser counts to it."""
        start, end = node.start_mark.index, node.end_mark.index
        while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value and not hasattr(node, "of"):
            last = node.value[-1]
            node = last[1] if isinstance(last, tuple) else last
            end = node.end_mark.index
        return start + len(self.text[start:end].rstrip())

    def aliases(self, node: yaml.Node) -> Iterator[yaml.Node]:
        if hasattr(node, "of"):
            yield node
        elif isinstance(node, yaml.CollectionNode):
            for item in node.value:
                for part in item if isinstance(item, tuple) else [item]:
                    yield from self.aliases(part)

    def changed(self) -> str:
        """Return the new text."""
        edits = list(self.edits)
        for node, new in self.added.values():
            at = node.value[0][0].start_mark
            between = ", " if node.flow_style else "\n" + " " * at.column
            edits.append(
                (at.index, at.index, "".join(f"{name}: {flow(value)}{between}" for name, value in new.items()))
            )
        # An alias of a changed value, or of its surroundings, is replaced by a copy of the former value.
        alias: Any
        for alias in self.aliases(self.root):
            start, end = alias.start_mark.index, alias.end_mark.index
            first, last = alias.of.start_mark.index, self.end(alias.of)
            inside = any(from_ <= start and end <= to and from_ < to for from_, to, _ in edits)
            if not inside and any(from_ < last and to > first for from_, to, _ in [*self.edits, *edits]):
                edits.append((start, end, flow(tree(alias))))
        text = self.text
        for start, end, new_text in sorted(edits, reverse=True):
            text = text[:start] + new_text + text[end:]
        text = self.append(text) if self.variables else text
        after = tree(parse(text))
        if after != self.expected:
            raise VaultError("it is written in a way that cannot be edited safely; use ansible-vault edit")
        return text

    def append(self, text: str) -> str:
        """Return a text with further variables, at its end or, where it is one flow dictionary, at its beginning."""
        root = parse(text)
        if root.flow_style and root.value:
            at = root.value[0][0].start_mark.index
            return text[:at] + "".join(f"{name}: {flow(value)}, " for name, value in self.variables.items()) + text[at:]
        if not root.value:
            # The empty dictionary is removed, comments stay.
            text = text.replace("{}", "") if root.flow_style else text
        column = root.value[0][0].start_mark.column if root.value else 0
        lines = ""
        for name, value in self.variables.items():
            if isinstance(value, list):
                lines += f"{name}:\n  {block(value, 2)}\n"
            else:
                lines += f"{name}:\n" + "".join(f"  {purpose}: {flow(held)}\n" for purpose, held in value.items())
        lines = "".join(f"{' ' * column}{line}\n" for line in lines.splitlines())
        at = root.end_mark.index if root.value else len(text)
        between = "" if not text[:at] or text[:at].endswith("\n") else "\n"
        return text[:at] + between + lines + text[at:]


def authorities(present: Tree, new: Mapping[str, str]) -> Tree:
    """Return the next step of changing the CA: the new CA is trusted, then signs, then the old CA is removed."""
    made = {name: (TEXT, f"{value.strip()}\n") for name, value in new.items()}
    if not isinstance(present, list) or not all(
        isinstance(entry, dict) and "certificate" in entry for entry in present
    ):
        raise VaultError(f"{AUTHORITIES} must be a list of one CA or two, each with certificate and private_key")
    if len(present) < 2:
        return [*present, made]
    try:
        first, second = (x509.load_pem_x509_certificate(entry["certificate"][1].encode()) for entry in present[:2])
    except (AttributeError, ValueError):
        raise VaultError(f"{AUTHORITIES} holds what is no certificate in PEM") from None
    if first.not_valid_before_utc <= second.not_valid_before_utc:
        return [present[1], present[0], *present[2:]]
    return present[:1]


def certificates(text: str) -> list[str]:
    """Return the certificates of the trusted CAs, which are public; none where one of them is a template."""
    found = tree(parse(text)).get(AUTHORITIES)
    written = (
        [entry.get("certificate") for entry in found]
        if isinstance(found, list) and all(isinstance(e, dict) for e in found)
        else []
    )
    texts = [held[1] for held in written if isinstance(held, tuple)]
    try:
        for each in texts:
            x509.load_pem_x509_certificate(each.encode())
    except ValueError:
        return []
    return texts if len(texts) == len(written) else []


def renewed(
    text: str, declared: Secrets, wanted: Sequence[str], authority: Mapping[str, str]
) -> tuple[str, list[str], list[str]]:
    """Return a vault's text with fresh values of the wanted secrets, their names, and the names left as templates."""
    try:
        vault = Vault(text, declared)
        chosen, left = vault.choose(wanted)
        for name in chosen:
            vault.renew(name, authority)
        return vault.changed(), chosen, left
    except RecursionError:
        raise VaultError("it is nested too deeply") from None


def completed(
    text: str, declared: Secrets, elsewhere: Sequence[str], authority: Mapping[str, str]
) -> tuple[str, list[str]]:
    """Return a vault's text with a first value for each secret that it and the inventory lack, and their names."""
    try:
        vault = Vault(text, declared)
        missing = [name for name in vault.known() if name not in {*elsewhere, GENERATION} and vault.find(name) is None]
        for name in missing:
            vault.add(name, authority)
        return vault.changed(), missing
    except RecursionError:
        raise VaultError("it is nested too deeply") from None
