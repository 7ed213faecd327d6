"""Tables in documents that are made of what the roles declare. `python tests/shared/tables.py` writes them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).resolve().parents[2] / "ansible/plugins/module_utils"))

import larder_stack

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of the table -->", re.DOTALL)


def table(*rows: tuple[str, ...]) -> str:
    """Return rows, of which the first is the heading, as Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def code(*names: object) -> str:
    return ", ".join(f"`{name}`" for name in names)


def described(
    options: Mapping[str, Mapping[str, Any]], computed: Collection[str] = (), prefix: str = ""
) -> Iterator[tuple[str, ...]]:
    """Return a row for each variable and for each part of one."""
    for name, option in options.items():
        if "default" in option:
            default = code(yaml_text(option["default"]))
        else:
            default = "required" if option.get("required") else "computed" if name in computed else ""
        text = re.sub(r"[CI]\((.*?)\)", r"`\1`", " ".join(str(option["description"]).split()))
        choices = f" One of {code(*option['choices'])}." if "choices" in option else ""
        yield code(f"{prefix}{name}"), option.get("type", "str"), default, text + choices
        yield from described(option.get("options", {}), prefix=f"{prefix}{name}.")


def yaml_text(held: object) -> str:
    return yaml.safe_dump(held, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")


def variables(document: Path) -> str:
    """Return the variables of the role whose README the document is."""
    specifications = yaml.safe_load((document.parent / "meta/argument_specs.yml").read_text())["argument_specs"]
    defaults = yaml.safe_load((document.parent / "defaults/main.yml").read_text())
    options = {name: option for entry in specifications.values() for name, option in entry["options"].items()}
    return table(("variable", "type", "default", "meaning"), *described(options, defaults))


def declarations(_document: Path) -> str:
    """Return what every role of the stack declares."""
    rows = []
    for name, role in larder_stack.read().roles.items():
        groups = [f"{code(group)}{hosts(limits)}" for group, limits in role.groups.items()]
        ports = [f"{code(port.port or port.protocol)} to {', '.join(port.open_to)}" for port in role.ports.values()]
        secrets = [
            f"{code(secret)}: {', '.join(declared.purposes)}"
            + (f"; used by {', '.join(declared.used_by)}" if declared.used_by else "")
            for secret, declared in role.secrets.items()
        ]
        where = "every host" if role.every_host else ", ".join(groups)
        if where:
            rows.append((name, where, "; ".join(ports), "; ".join(secrets), "yes" if role.certificate else ""))
    return table(("role", "groups, hosts", "ports, open to", "secrets", "certificate"), *rows)


def hosts(limits: Mapping[str, int]) -> str:
    least, most = limits.get("min", 0), limits.get("max")
    if least == most:
        return f", {least}"
    return f", {least} or more" if least else ""


TABLES = {"variables": variables, "declarations": declarations}


def documents() -> list[Path]:
    """Return the documents that have a table, in order."""
    return [path for path in sorted(ROOT.glob("[dr]o*/**/*.md")) if TABLE.search(path.read_text())]


def current(document: Path) -> str:
    """Return a document's text with its tables as they are to be."""
    return TABLE.sub(
        lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]](document)}\n<!-- end of the table -->",
        document.read_text(),
    )


if __name__ == "__main__":
    for document in documents():
        document.write_text(current(document))
