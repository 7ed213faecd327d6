"""Every role's defaults, argument specification and use of variables agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# The roles of the stack, and the example of a new one.
ROLES = sorted(
    path.parents[1] for folder in ("roles", "tests/roles") for path in ROOT.glob(f"{folder}/*/meta/main.yml")
)
# Where a role's variables may be read: beside the roles, what roles render and what plugins ask for by name.
READERS = [ROOT / "roles", ROOT / "templates", ROOT / "ansible", ROOT / "tests/roles"]
DEFINITIONS = {"argument_specs.yml", "README.md"}

pytestmark = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def options(role: Path) -> dict[str, dict[str, Any]]:
    entries = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    return {name: option for entry in entries.values() for name, option in entry.get("options", {}).items()}


def defaults(role: Path) -> dict[str, Any]:
    path = role / "defaults/main.yml"
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def is_literal(value: Any) -> bool:
    return "{{" not in str(value)


def described(specification: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, option in specification.items():
        yield prefix + name, option.get("description")
        yield from described(option.get("options", {}), f"{prefix}{name}.")


@cache
def text_of_readers() -> list[tuple[Path, str]]:
    files = [path for directory in READERS for path in sorted(directory.rglob("*")) if path.is_file()]
    return [(path, path.read_text(errors="replace")) for path in files if path.name not in DEFINITIONS]


def test_every_role_has_an_argument_specification(role: Path) -> None:
    assert (role / "meta/argument_specs.yml").exists(), f"{role.name} has no argument specification"


def test_every_default_is_specified_and_every_variable_carries_the_roles_prefix(role: Path) -> None:
    assert defaults(role).keys() - options(role).keys() == set()
    assert [name for name in options(role) if not name.startswith(f"{role.name}_")] == []


def test_every_variable_has_a_default_or_is_required_or_optional_by_nature(role: Path) -> None:
    """What has no default is required, or the role asks whether it is defined."""
    own = "\n".join(text for path, text in text_of_readers() if role in path.parents)
    for name in options(role).keys() - defaults(role).keys():
        asked = re.search(rf"\b{name}\b(\.\w+)*\s*(\|\s*default\(|is (not )?defined)", own)
        assert options(role)[name].get("required") or asked, f"{name} has no default and is not required"


def test_specification_and_defaults_say_the_same(role: Path) -> None:
    values = defaults(role)
    for name, option in options(role).items():
        if name in values and is_literal(values[name]):
            literal = "default" in option or option["type"] in {"list", "dict"}
            assert literal, f"{name} has no default in the specification"
            if "default" in option:
                assert option["default"] == values[name], name
        else:
            assert "default" not in option, f"{name} has a default in the specification alone, or a computed one"
        assert not ("default" in option and option.get("required")), name


def test_every_variable_is_described(role: Path) -> None:
    assert [name for name, text in described(options(role)) if not text] == []


def test_every_variable_is_read_somewhere(role: Path) -> None:
    own_defaults = role / "defaults/main.yml"
    for name in options(role):
        # In its own defaults a variable is read where another one is computed from it: any line but its definition.
        definition = re.compile(rf"^{name}:.*$|^#.*$", re.MULTILINE)
        texts = (definition.sub("", text) if path == own_defaults else text for path, text in text_of_readers())
        assert any(re.search(rf"\b{name}\b", text) for text in texts), f"nothing reads {name}"


def uses(role: Path, kinds: set[str]) -> Iterator[tuple[Path, str, str, str]]:
    """Yield where roles compute with a role's variables of these types: file, code before, name, code after."""
    names = [name for name, option in options(role).items() if option.get("type") in kinds]
    if not names:
        return
    number = re.compile(rf"(?<![\w.'\"])(?:{'|'.join(names)})\b(?!\s*=)")
    for path, text in (found for found in text_of_readers() if found[0].suffix != ".py"):
        for block in re.finditer(r"\{\{.*?\}\}|\{%.*?%\}|<<.*?>>|\b(?:when|that|until):.*?\n", text, re.DOTALL):
            # Text in quotes is no name.
            code = re.sub(r"'[^']*'", lambda quoted: " " * len(quoted.group()), block.group()[2:].removesuffix("}}"))
            for use in number.finditer(code):
                yield path, code[: use.start()], use.group(), code[use.end() :]


def test_a_number_that_is_computed_with_may_be_text(role: Path) -> None:
    """`-e NAME=20` is text, and Python's '20' * 86400 is no error."""
    assert [
        f"{path.relative_to(ROOT)}: {name}"
        for path, before, name, after in uses(role, {"int", "float"})
        if not re.match(r"\s*\|\s*(?:int|float)\b", after)
        and (re.match(r"\s*(?:[*/+<]|>=?(?!>)|%(?!\}))", after) or re.search(r"(?:[*/+>]|(?<![\w%])-|<=?)\s*$", before))
    ] == []


def test_a_switch_may_be_text(role: Path) -> None:
    """`-e NAME=false` is text, and true; as a condition it ends the run."""
    assert [
        f"{path.relative_to(ROOT)}: {name}"
        for path, _, name, after in uses(role, {"bool"})
        # Ansible reads its own keyword no_log as a switch.
        if name != "larder_secure_logging" and not re.match(r"\s*\|\s*(?:bool\b|default\(\w+\)\s*\|\s*bool\b)", after)
    ] == []
