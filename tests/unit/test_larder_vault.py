"""A vault is edited in any form that YAML has, and nothing in it changes but what was to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import larder_vault
from larder_stack import Secret, read

SECRETS = {
    "redis_passwords": Secret(["serve", "push", "admin"]),
    "gateway_tokens": Secret(["reader", "writer"], two=True),
    "archive_secrets": Secret(["archive_passphrase"]),
}
NEW = {"certificate": "NEW\nCERTIFICATE\n", "private_key": "NEW\nKEY\n"}
FRESH = re.compile(r"[A-Za-z][A-Za-z0-9]{39}")


def meaning(text: str) -> dict[str, Any]:
    found: dict[str, Any] = larder_vault.tree(larder_vault.parse(text))
    return found


def plain(held: Any) -> Any:
    if isinstance(held, dict):
        return {name: plain(value) for name, value in held.items()}
    return [plain(item) for item in held] if isinstance(held, list) else held[1]


def renewed(text: str, *wanted: str) -> dict[str, Any]:
    new, names, _ = larder_vault.renewed(text, SECRETS, wanted, NEW)
    before, after = meaning(text), meaning(new)
    for name in names:
        variable, _, purpose = name.partition(".")
        old, now = before.pop(variable), after.pop(variable)
        if purpose:
            was, becomes = old.pop(purpose), now.pop(purpose)
            current = was[0] if isinstance(was, list) else was
            if variable == "gateway_tokens":
                assert becomes[1] == current
                becomes = becomes[0]
            assert FRESH.fullmatch(becomes[1])
            assert becomes != current
            before[variable], after[variable] = old, now
    assert before == after
    return plain(meaning(new))


FORMS = {
    "block list": "gateway_tokens:\n  reader:\n    - CURRENT # today\n    - FORMER # before\n  writer: x\n# end\n",
    "block list at the name's column": "gateway_tokens:\n  reader:\n  - CURRENT\n  writer: x\n",
    "one in a block list": "gateway_tokens:\n  reader:\n    # why\n    - CURRENT # of today\n  writer: x\n",
    "flow": "{gateway_tokens: {reader: [CURRENT, FORMER], writer: x}, other: {a: b}}\n",
    "JSON": '{"gateway_tokens":{"reader":["CURRENT","FORMER"],"writer":"x"},"other":{"a":"b"}}',
    "flow in lines": "gateway_tokens: {\n  reader: [\n    CURRENT, # of today\n    FORMER],\n  writer: x\n}\n",
    "anchored": "gateway_tokens:\n  reader: &t CURRENT\n  writer: x\nother: *t\nthird: [*t, {*t : *t}]\n",
    "alias": "other: &token CURRENT\ngateway_tokens:\n  reader: *token\n  writer: x\n",
    "anchored list": "gateway_tokens:\n  reader: &b\n    - &o CURRENT\n    - FORMER\n  writer: x\nother: [*b, *o]\n",
    "alias of a list": "other: &both [CURRENT, FORMER]\ngateway_tokens:\n  reader: *both\n  writer: x\n",
    "alias of all": "other: &all\n  reader: CURRENT # of today\n  writer: x\ngateway_tokens: *all\n",
    "anchored all": "gateway_tokens: &all\n  reader: CURRENT # of today\n  writer: x\nother: *all\n",
    "merged": "other: &base {reader: CURRENT, note: y}\ngateway_tokens:\n  <<: *base\n  writer: x\n",
    "merged twice": "a: &a {reader: CURRENT}\nb: &b {reader: no}\ngateway_tokens: {<<: [*a, *b], writer: x}\n",
    "merged variable": "base: &base\n  gateway_tokens: {reader: CURRENT, writer: x}\n<<: *base\n",
    "merges what changes": "gateway_tokens: &all {reader: CURRENT, writer: x}\nother:\n  <<: *all\n  more: y\n",
    "literal": "gateway_tokens:\n  reader: |-\n    CURRENT\n\n  # and\n  writer: x\n",
    "folded": "gateway_tokens:\n  reader: >-\n    CURRENT\n  writer: >\n    x\n    y\n\nother: z\n",
    "literal in a list": "gateway_tokens:\n  reader:\n    - |-\n      CURRENT\n    - >-\n      FORMER\n  writer: x\n",
    "quoted": "gateway_tokens:\n  'reader': 'CURRENT'\n  \"writer\": \"x\" # y\n",
    "quoted in lines": 'gateway_tokens:\n  reader: "CURR\\\n    ENT"\n  writer: x\n',
    "unsafe": "gateway_tokens:\n  reader: !unsafe 'CURRENT'\n  writer: !unsafe \"{{ x\"\n",
    "tagged": "gateway_tokens: !!map\n  reader: !!str CURRENT\n  writer: x\n",
    "explicit": "? gateway_tokens\n: ? reader\n  : CURRENT\n  ? writer\n  : x\n",
    "marks of a document": "%YAML 1.1\n---\ngateway_tokens:\n  reader: CURRENT\n  writer: x\n...\n",
    "Windows": "gateway_tokens:\r\n  reader: CURRENT\r\n  writer: x\r\nother: y\r\n",
    "byte order mark": "\ufeffgateway_tokens:\n  reader: CURRENT\n  writer: x\n",
    "no last line end": "other: y\ngateway_tokens:\n  writer: x\n  reader: CURRENT",
    "indented": "  gateway_tokens:\n      reader: CURRENT\n      writer: x\n  other: y\n",
    "wide characters": "другое: 🔑 # 🔑🔑\ngateway_tokens:\n  reader: CURRENT # ключ\n  writer: x\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_token_is_renewed_in_every_form(text: str) -> None:
    new, names, _ = larder_vault.renewed(text, SECRETS, ["gateway_tokens.reader"], NEW)
    assert names == ["gateway_tokens.reader"]
    assert renewed(text, "gateway_tokens.reader")["gateway_tokens"]["reader"][1] == "CURRENT"
    assert renewed(text)["gateway_tokens"]["reader"][1] == "CURRENT"
    # Comments stay where what they speak of stays.
    assert re.findall("# ключ|# end|# why|# and", new) == re.findall("# ключ|# end|# why|# and", text)
    # Again and again: what was fresh is the former.
    assert larder_vault.renewed(new, SECRETS, [], NEW)[1] == ["gateway_tokens.reader", "gateway_tokens.writer"]


def test_unknown_values_stay_byte_for_byte() -> None:
    text = (
        "# first\ncertificate_provided:   {gateway: {certificate: PEM, private_key: KEY}}\nbackup_passphrase: a\n"
        "archive_secrets: {archive_passphrase: b}\nmine:\n  serve: c\n  push: [d,   e]\nredis_passwords: {mine: f}\n"
    )
    assert larder_vault.renewed(text, SECRETS, [], NEW) == (text, [], [])


def test_templates_are_left_and_named() -> None:
    text = "redis_passwords:\n  serve: '{{ lookup(\"x\") }}'\n  push: a\ngateway_tokens: '{{ tokens }}'\n"
    new, names, left = larder_vault.renewed(text, SECRETS, [], NEW)
    assert (names, left) == (
        ["redis_passwords.push"],
        ["redis_passwords.serve", "gateway_tokens.reader", "gateway_tokens.writer"],
    )
    assert "lookup" in new
    with pytest.raises(larder_vault.VaultError, match="is a template"):
        larder_vault.renewed(text, SECRETS, ["redis_passwords.serve"], NEW)


CANARY = "CANARYcanary0123456789"
REFUSED = {
    "two documents": f"redis_passwords: {{serve: {CANARY}}}\n---\na: {CANARY}\n",
    "an alias of nothing": f"redis_passwords:\n  serve: *{CANARY}\n",
    "an unknown tag": f"redis_passwords:\n  serve: !{CANARY} x\n",
    "a doubled name": f"redis_passwords:\n  {CANARY}: x\n  {CANARY}: x\n",
    "a doubled variable": f"redis_passwords: {{serve: {CANARY}}}\nredis_passwords: {{serve: x}}\n",
    "no number": f"redis_passwords:\n  serve: !!int {CANARY}\n",
    "a list": f"- {CANARY}\n",
    "a text": f"{CANARY}\n",
    "a lost line": f"redis_passwords:\n  serve: {CANARY}\n push: {CANARY}\n",
    "a list of passwords": f"redis_passwords: [{CANARY}]\n",
    "a dictionary of tokens": f"gateway_tokens: {{reader: {{{CANARY}: {CANARY}}}}}\n",
    "a generation that is none": f"certificate_generation: {CANARY}\n",
    "a generation of tokens": f"certificate_generation: {{reader: {CANARY}}}\n",
    "an alias of itself": f"redis_passwords: &a\n  serve: {CANARY}\n  push: *a\n",
    "an open quote": f"redis_passwords:\n  serve: '{CANARY}\n  push: x\n",
    "a tab": f"redis_passwords:\n\tserve: {CANARY}\n",
    "a name of a list": f"? [{CANARY}]\n: x\n",
    "a control character": f"redis_passwords: {{serve: '{CANARY}\x01'}}\n",
    "a merge of a text": f"redis_passwords:\n  <<: {CANARY}\n",
    "very deep": "[" * 5000 + CANARY + "]" * 5000,
    "a date that is none": "redis_passwords: {serve: 2026-13-45}\n",
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("an unknown tag", "the value at line 2, column 10"),
        ("a doubled name", "the name at line 3, column 3 stands"),
        ("two documents", "it holds more than one document"),
        ("a list", "it holds no variables"),
    ],
)
def test_the_place_of_what_cannot_be_read_is_named(name: str, place: str) -> None:
    with pytest.raises(larder_vault.VaultError, match=place):
        larder_vault.renewed(REFUSED[name], SECRETS, [], NEW)


@pytest.mark.parametrize(
    ("secret", "sentence"),
    [
        ("other", "secrets has a name that is none of the vault's; it has "),
        ("archive_secrets.archive_passphrase", "a passphrase opens what was closed with it, and is never made anew"),
    ],
)
def test_what_is_no_secret_and_a_passphrase_cannot_be_renewed(secret: str, sentence: str) -> None:
    with pytest.raises(larder_vault.VaultError, match=sentence):
        larder_vault.renewed(FORMS["flow"], SECRETS, [secret], NEW)


def test_the_passphrase_of_the_backups_is_never_made_anew() -> None:
    """Whatever the vault's other secrets become, the backups of before can be read."""
    text = "backup_passphrases: {repository: abcabcabcabcabcabc}\nredis_passwords: {serve: defdefdefdefdefdefdef}\n"
    new, names, _ = larder_vault.renewed(text, read().secrets, [], NEW)
    assert names == ["redis_passwords.serve"]
    assert "backup_passphrases: {repository: abcabcabcabcabcabc}\n" in new
    for wanted in ("backup_passphrases", "backup_passphrases.repository"):
        with pytest.raises(larder_vault.VaultError, match="never made anew"):
            larder_vault.renewed(text, read().secrets, [wanted], NEW)


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_an_unreadable_vault_is_refused_without_showing_it(text: str) -> None:
    for wanted in ([], [CANARY]):
        with pytest.raises(larder_vault.VaultError) as refusal:
            larder_vault.renewed(text, SECRETS, wanted, NEW)
        assert "CANARY" not in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 300


PARTIAL = {
    "empty": "",
    "a comment": "# ours\n",
    "a mark": "---\n",
    "empty dictionary": "{}\n",
    "other variables": "other: x\n# end\n",
    "no last line end": "other: x",
    "ended": "---\nother: x\n...\n",
    "literal last": "other: |\n  x\n\n\n",
    "flow": "{other: x}\n",
    "indented": "  other: x\n",
    "some": "redis_passwords:\n  # ours\n  serve: a\n",
    "some in flow": "redis_passwords: {serve: a}\n",
    "null": "redis_passwords:\ngateway_tokens: ~\n",
    "null purposes": "redis_passwords:\n  serve:\n  push: # later\n  admin: ''\n",
    "flow without values": "redis_passwords: {serve, push: , admin: ''}\n",
    "empty purposes": "redis_passwords: {}\ngateway_tokens: {reader: [], writer: x}\n",
    "shared": "other: &all {serve: a}\nredis_passwords: *all\n",
    "merged": "other: &all {serve: a}\nredis_passwords: {<<: *all}\n",
    "shared the other way": "redis_passwords: &all {serve: a}\nother: *all\n",
}


@pytest.mark.parametrize("text", PARTIAL.values(), ids=PARTIAL)
def test_missing_secrets_are_added_and_nothing_else_changes(text: str) -> None:
    new, names = larder_vault.completed(text, SECRETS, [], NEW)
    before, after = plain(meaning(text)), plain(meaning(new))
    for variable, secret in SECRETS.items():
        for purpose in secret.purposes:
            held = (before.get(variable) or {}).get(purpose) if isinstance(before.get(variable), dict) else None
            assert after[variable][purpose] == held if held else FRESH.fullmatch(after[variable][purpose])
            assert (f"{variable}.{purpose}" in names) is not bool(held)
    assert after["certificate_authorities"] == [NEW]
    assert {name: after[name] for name in before if name not in SECRETS} == {
        name: before[name] for name in before if name not in SECRETS
    }
    for comment in re.findall("#.*", text):
        assert comment in new
    # Nothing is left to do, and what was made can be made anew.
    assert larder_vault.completed(new, SECRETS, [], NEW) == (new, [])
    assert len(larder_vault.renewed(new, SECRETS, [], NEW)[1]) == 5


def test_secrets_of_other_inventory_files_are_not_added() -> None:
    elsewhere = ["redis_passwords.serve", "redis_passwords.push", "redis_passwords.admin", "certificate_authorities"]
    new, names = larder_vault.completed("a: b\n", SECRETS, elsewhere, NEW)
    assert names == ["gateway_tokens.reader", "gateway_tokens.writer", "archive_secrets.archive_passphrase"]
    assert "redis" not in new


VALUES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"]), min_size=1, max_size=30)


@st.composite
def scalars(draw: st.DrawFn, indent: int, *, within: bool = False) -> tuple[str, bool]:
    """Return a text in one of YAML's forms, and whether it may stand in a flow."""
    value = draw(VALUES)
    single = "'" + value.replace("'", "''") + "'"
    double = yaml.dump(value, default_style='"', width=10**6, allow_unicode=draw(st.booleans())).strip()
    word = "w" + re.sub("[^a-z0-9]", "", value)
    forms = [single, double, word, f"!unsafe {single}", f"!!str {double}"]
    if not within and value.strip() == value and value.isprintable():
        pad = "\n" + " " * indent
        forms += [f"|-{pad}{word}", f">{pad}{word}{pad}{word}\n", f"|+{pad}{word}\n\n"]
    return draw(st.sampled_from(forms)), True


@st.composite
def vaults(draw: st.DrawFn) -> str:
    """Return a vault with every purpose, and others, in any mixture of forms, with a comment after each line."""
    anchors: list[str] = []

    def scalar(indent: int, *, within: bool) -> str:
        if anchors and draw(st.integers(0, 5)) == 0:
            return "*" + draw(st.sampled_from(anchors)) + " "
        text, _ = draw(scalars(indent, within=within))
        if draw(st.integers(0, 3)) == 0:
            anchors.append(f"a{len(anchors)}")
            return f"&{anchors[-1]} {text}"
        return text

    def token(indent: int, *, within: bool) -> str:
        form = draw(st.sampled_from(["one", "flow", "block"]))
        count = draw(st.integers(1, 2))
        if form == "one":
            return scalar(indent + 2, within=within)
        if form == "flow" or within:
            return "[" + ", ".join(scalar(0, within=True) for _ in range(count)) + "]"
        pad = " " * draw(st.sampled_from([indent, indent + 2]))
        return "".join(f"\n{pad}- {scalar(indent + 4, within=False)}" for _ in range(count))

    out = draw(st.sampled_from(["", "---\n", "# first\n---\n"]))
    variables = draw(st.permutations(["redis_passwords", "gateway_tokens", "other"]))
    for variable in variables:
        purposes = draw(st.permutations(SECRETS.get(variable, Secret(["serve", "mine"])).purposes))
        make = token if variable == "gateway_tokens" else scalar
        if draw(st.booleans()):
            out += f"{variable}:\n"
            for purpose in purposes:
                out += f"  {purpose}: {make(4 if make is scalar else 2, within=False)}".rstrip(" ")
                out += "\n" + draw(st.sampled_from(["", "  # why\n", "\n", "# left\n"]))
        else:
            out += (
                f"{variable}: {{"
                + ", ".join(f"{purpose}: {make(0, within=True)}" for purpose in purposes)
                + "} # end\n"
            )
    return out


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    vaults(),
    st.lists(
        st.sampled_from(["redis_passwords.serve", "redis_passwords", "gateway_tokens.writer", "gateway_tokens"]),
        max_size=2,
    ),
)
def test_any_vault_is_renewed(text: str, wanted: list[str]) -> None:
    vault = larder_vault.Vault(text, SECRETS)
    if not any(larder_vault.is_template(node) for node in map(vault.find, vault.known()) if node):
        renewed(text, *wanted)
        new = larder_vault.renewed(text, SECRETS, wanted, NEW)[0]
        assert new.count("# end") == text.count("# end")
