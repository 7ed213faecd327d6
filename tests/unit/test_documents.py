"""What a document says is so: links lead somewhere, files and tests are there, commands have these options."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import playbooks
import pytest
import run
import yaml
from ansible.cli.adhoc import AdHocCLI
from ansible.cli.playbook import PlaybookCLI
from ansible.cli.vault import VaultCLI

from larder.cli import main as larder

ROOT = Path(__file__).parents[2]
DOCUMENTS = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
).stdout.splitlines()
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
TEST = re.compile(r"\btest_\w+")
PLACE = re.compile(r"\b(?:ansible|bench|docs|feature_repo|inventory|molecule|roles|src|templates|tests)/[\w./*<>-]*")
# What a reader makes: secrets beside a copy of inventory/example, and the role of the page that adds one.
NEW_ROLE = "hello"
MADE = re.compile(rf"(vault\.yml(\.former)?|\.vault_password|ca\.crt)$|\b{NEW_ROLE}\b")
URL = re.compile(r"(https?)://[\w.{}-]+:(\d+)")
# Ports on which the stack's services speak TLS, and all but the gateway's ask for a client's certificate.
SHARED = yaml.safe_load((ROOT / "roles/larder/defaults/main.yml").read_text())
PORTS = {
    port + number: name
    for name, port in SHARED.items()
    if name.endswith("_port") and isinstance(port, int)
    for number in range(SHARED.get(name.replace("_check", "").replace("_port", "_instances"), 1))
}
UNIT = re.compile(
    r"(UNIT|NAME|cron|docker|haproxy|patroni|etcd|pgbackrest|larder-(drill|status)|postgresql@17-main|redis-(server|sentinel)|"
    r"systemd-timesyncd|prometheus(-alertmanager|-(node|postgres|redis|blackbox)-exporter)?|feature-pipeline|feast-(verify|skew)|"
    r"(feature|push)-server@(\d|\*|\$n))(\.(service|timer))?"
)
TAGS = {NEW_ROLE} | set(re.findall(r"\w+", " ".join(re.findall(r"tags: \[(.+)\]", (ROOT / "site.yml").read_text()))))
VARIABLES = " ".join(
    path.read_text()
    for pattern in ("ansible/*.yml", "ansible/tasks/*.yml", "roles/*/defaults/main.yml")
    for path in ROOT.glob(pattern)
)
USAGE = subprocess.run([ROOT / "larder", "help"], check=True, capture_output=True, text=True).stdout
KNOWN_TESTS = {
    name
    for folder in ("molecule", "tests")
    for path in ROOT.glob(f"{folder}/**/test_*.py")
    for name in (path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
}


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub and its like make of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> Iterator[str]:
    for link in LINK.findall(CODE.sub("", document.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        if not path.exists():
            yield f"{link}: no such file"
        elif anchor and (path.suffix != ".md" or anchor not in anchors(path)):
            yield f"{link}: no such heading"


def missing_files(text: str) -> Iterator[str]:
    """Yield the paths of this checkout that lead nowhere; a placeholder such as <role> stands for anything."""
    for place in PLACE.findall(text):
        pattern = re.sub(r"<\w+>", "*", place.rstrip(".")).replace("inventory/prod", "inventory/example")
        if not MADE.search(pattern) and not any(ROOT.glob(pattern)):
            yield f"{place}: no such file"


def missing_tests(text: str) -> Iterator[str]:
    yield from (f"{name}: no such test" for name in TEST.findall(text) if name not in KNOWN_TESTS)


def wrong_schemes(text: str) -> Iterator[str]:
    for scheme, port in URL.findall(text):
        if scheme == "http" and int(port) in PORTS:
            yield f"port {port} ({PORTS[int(port)]}) is asked by http, and speaks TLS"


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script."""
    waiting = ""
    for line in shell.replace("\\\n", " ").splitlines():
        waiting += line + "\n"
        lexer = shlex.shlex(waiting, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = [*lexer]
        except ValueError:  # a quotation goes on in the next line
            continue
        waiting = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if not set(word) <= set("();<>|&"):
                if command or not re.match(r"sudo$|do$|\w+=", word):
                    command.append(word)
            elif command:
                yield command
                command = []


def of_this_checkout(command: str, *names: str) -> Iterator[str]:
    if command not in re.findall(r"^  (\w+)", USAGE, re.MULTILINE):
        yield f"{command} is no command"
    if command == "test":
        try:
            run.chosen(names)
        except SystemExit as refused:
            yield str(refused)


def of_larder(*words: str) -> Iterator[str]:
    command: click.Command = larder
    for word in words:
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
        elif word.startswith("--") and word not in {
            "--help",
            *(name for option in command.params for name in option.opts),
        }:
            yield f"{word} is no option"
        elif isinstance(command, click.Group) and not word.startswith("-"):
            yield f"{word} is no command"


def of_ansible(program: str, *words: str) -> Iterator[str]:
    cli = {"ansible": AdHocCLI, "ansible-playbook": PlaybookCLI, "ansible-vault": VaultCLI}[program]([program, *words])
    cli.init_parser()
    try:
        given = cli.parser.parse_args(words)
    except SystemExit:
        yield "Ansible does not take these options"
        return
    if program == "ansible" and given.module_name == "command":
        yield from wrong_commands(given.module_args)
    if program == "ansible-playbook":
        yield from (f"{name}: no such playbook" for name in given.args if not (ROOT / name).exists())
        tags = {tag for tags in given.tags or () for tag in tags.split(",")}
        yield from (f"{tag} is no tag of site.yml" for tag in tags - TAGS)
        names = re.findall(r"(\w+)=", " ".join(given.extra_vars))
        yield from (f"{name} is no variable" for name in names if not re.search(rf"\b{name}\b", VARIABLES))


def of_molecule(*words: str) -> Iterator[str]:
    names = [word for option, word in pairwise(words) if option == "-s"]
    yield from (f"{name} is no scenario" for name in names if name not in run.scenarios())


def of_systemctl(_verb: str, *words: str) -> Iterator[str]:
    yield from (f"{word} is no unit" for word in words if not word.startswith("-") and not UNIT.fullmatch(word))


def of_journalctl(*words: str) -> Iterator[str]:
    yield from of_systemctl("", *(word for option, word in pairwise(words) if re.fullmatch(r"-\w*u", option)))


def of_python(path: str, *words: str) -> Iterator[str]:
    if path.endswith(".py"):
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        source = (ROOT / path).read_text()
        yield from (f"{option} is no option" for option in options if f'"{option}"' not in source)


CHECKS: dict[str, Callable[..., Iterator[str]]] = {
    "./larder": of_this_checkout,
    "larder": of_larder,
    **{name: partial(of_ansible, name) for name in ("ansible", "ansible-playbook", "ansible-vault")},
    "molecule": of_molecule,
    "systemctl": of_systemctl,
    "journalctl": of_journalctl,
    "python": of_python,
}


def wrong_commands(shell: str) -> Iterator[str]:
    """Yield what is wrong with the commands of a script; nothing is known of programs beside those of CHECKS."""
    for program, *words in commands(shell):
        if check := CHECKS.get(program):
            yield from (f"{shlex.join([program, *words])}: {fault}" for fault in check(*words))


def scripts(text: str) -> Iterator[str]:
    """Yield the shell scripts of a document, and the commands that stand within its sentences."""
    yield from SHELL.findall(text)
    for span in SPAN.findall(CODE.sub("", text)):
        # Brackets are around what may be left out.
        if span.removeprefix("sudo ").split()[0] in CHECKS and " " in span:
            yield span.replace("[", "").replace("]", "")


def faults(document: Path) -> list[str]:
    text = document.read_text()
    found = [*dead_links(document), *missing_files(text), *missing_tests(text), *wrong_schemes(text)]
    return found + [fault for script in scripts(text) for fault in wrong_commands(script)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document: str) -> None:
    assert faults(ROOT / document) == []


def test_playbooks_and_modules_that_documents_name_are_read_by_ansible() -> None:
    text = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    named = {name for name in re.findall(r"(?:site|ansible/\w+)\.yml", text) if (ROOT / name).exists()}
    assert {"site.yml", "ansible/preflight.yml", "ansible/rotate_secrets.yml"} <= named
    listed = playbooks.run("--list-tasks", *named, inventories=["inventory/example"], one_stream=True)
    assert listed.returncode == 0, listed.stdout
    modules = set(re.findall(r"ansible-doc -t module (\w+)", text))
    assert {path.stem for path in (ROOT / "ansible/plugins/modules").glob("*.py")} >= modules != set()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see `roles/radis/tasks`", "roles/radis/tasks: no such file"),
        ("`test_nobody_is_here` proves it", "test_nobody_is_here: no such test"),
        ("ask http://192.0.2.13:6567/ready", "port 6567 (larder_feature_server_port) is asked by http, and speaks TLS"),
        ("`./larder test radis`", "no such part: radis"),
        ("`sudo larder load --zones x FILE`", "--zones is no option"),
        ("`larder lode`", "lode is no command"),
        ("```sh\nansible-playbook -i inventory/prod \\\n  sight.yml\n```", "sight.yml: no such playbook"),
        ("`ansible-playbook site.yml --tags radis`", "radis is no tag of site.yml"),
        ("`ansible-playbook site.yml --tag-s redis`", "Ansible does not take these options"),
        ("`ansible-playbook site.yml -e redis_maxmemroy=1`", "redis_maxmemroy is no variable"),
        ('`ansible pipeline -b -a "larder stats"`', "stats is no command"),
        ("`molecule test -s radis`", "radis is no scenario"),
        ("`sudo systemctl restart radis`", "radis is no unit"),
        ("`journalctl -fu radis`", "radis is no unit"),
        ("```sh\ntrue | python bench/load.py --no-such 1\n```", "--no-such is no option"),
    ],
)
def test_what_is_not_there_is_found(tmp_path: Path, text: str, fault: str) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"# Page\n\n{text}\n")
    (found,) = faults(document)
    assert fault in found


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# What is `here`, and there\n\n```sh\n# no heading\n```\n")
    document = tmp_path / "page.md"
    document.write_text("[a](other.md#what-is-here-and-there) [b](other.md#no-heading) [c](none.md) [d](https://e.f)\n")
    assert [*dead_links(document)] == ["other.md#no-heading: no such heading", "none.md: no such file"]
