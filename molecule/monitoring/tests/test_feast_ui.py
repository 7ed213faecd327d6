"""Feast's web interface as a person sees it, and what it refuses to whoever asks."""

from __future__ import annotations

import base64
import http.client
import json
import shlex
import ssl
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Browser

PORT = 8444
VIEWS = "/api/v1/feature_views?project=trading"
VIEW = "/api/v1/feature_views/market_features?project=trading"
# A host of the stack, with its certificate: what the gateway would not ask.
ASK = """
import http.client, json, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1] + "/ca.crt")
context.load_cert_chain(sys.argv[1] + "/tls.crt", sys.argv[1] + "/tls.key")
context.check_hostname = False
connection = http.client.HTTPSConnection(sys.argv[2], 8888, timeout=60, context=context)
connection.request(sys.argv[3], sys.argv[4])
answer = connection.getresponse()
print(json.dumps([answer.status, answer.read().decode()]))
"""


class Page:
    """The gateway's port for the interface, asked with any method and any login."""

    def __init__(self, inventory: Any) -> None:
        self.address = inventory.address("app1")
        self.trusting: ssl.SSLContext = inventory.trusted()
        variables = inventory.variables("app1")
        self.tokens = {**variables["gateway_tokens"], **variables["monitoring_tokens"]}
        self.tokens = {name: token[0] if isinstance(token, list) else token for name, token in self.tokens.items()}

    def ask(self, path: str, *, method: str = "GET", password: str = "", bearer: str = "") -> tuple[int, Any, str]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if password:
            headers = {"Authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"}
        connection = http.client.HTTPSConnection(self.address, PORT, timeout=60, context=self.trusting)
        connection.request(method, path, headers=headers, body="" if method in {"POST", "PUT", "PATCH"} else None)
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read().decode()
        connection.close()
        return found

    def see(self, path: str) -> Any:
        status, _, text = self.ask(path, password=self.tokens["viewer"])
        assert status == 200, text
        return json.loads(text)


@pytest.fixture(scope="module")
def page(inventory: Any) -> Page:
    return Page(inventory)


@pytest.mark.parametrize("path", ["/", VIEWS, "/static/js/none.js", "/health"])
@pytest.mark.parametrize("login", [{}, {"password": "wrong"}, {"bearer": "wrong"}])
def test_without_a_token_the_interface_asks_for_a_login(page: Page, path: str, login: dict[str, str]) -> None:
    status, headers, _ = page.ask(path, **login)
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="Larder", charset="UTF-8"')


@pytest.mark.parametrize("purpose", ["reader", "writer", "monitor"])
@pytest.mark.parametrize("scheme", ["password", "bearer"])
def test_a_token_of_another_purpose_does_not_see_it(page: Page, purpose: str, scheme: str) -> None:
    assert page.ask(VIEWS, **{scheme: page.tokens[purpose]})[0] == 403


def test_a_viewer_sees_what_is_registered(page: Page) -> None:
    found = page.see(VIEWS)["featureViews"]
    features = {view["spec"]["name"]: len(view["spec"]["features"]) for view in found}
    assert features["market_features"] > 0
    assert len(page.see("/projects-list.json")["projects"]) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", VIEW])
def test_nothing_but_get_is_passed_on(page: Page, method: str, path: str) -> None:
    assert page.ask(path, method=method, password=page.tokens["viewer"])[0] == 404
    assert page.see(VIEW)["spec"]["name"] == "market_features"


def test_the_page_shows_the_features_in_a_browser(browser: Browser, page: Page) -> None:
    url = f"https://{page.address}:{PORT}"
    seen = browser.open(url=f"{url}/p/trading/feature-view/market_features", until="text=spread")
    assert [line for line in seen["complaints"] if not line.startswith("warning")] == []
    assert {method for method, _, _ in seen["asked"]} == {"GET"}
    assert [asked for _, asked, _ in seen["asked"] if not asked.startswith((url, "data:"))] == []
    assert {status for _, _, status in seen["asked"]} == {200}
    listed = browser.open(url=f"{url}/p/trading/feature-view", until="text=market_features")["text"]
    assert {view["spec"]["name"] for view in page.see(VIEWS)["featureViews"]} <= set(listed.split())
    browser.picture("catalogue.png")


def test_it_is_no_way_to_features(page: Page) -> None:
    for token in page.tokens.values():
        assert page.ask("/get-online-features", method="POST", bearer=token)[0] in {403, 404}


def test_a_host_of_the_stack_can_change_nothing_by_it(inventory: Any, page: Page) -> None:
    for method in ("DELETE", "POST", "PUT"):
        arguments = ["/etc/larder/tls/gateway/current", inventory.address("monitor1"), method, VIEW]
        status, text = json.loads(inventory.run("app1", shlex.join(["sudo", "python3", "-", *arguments]), ASK))
        assert (status, json.loads(text)) == (405, {"detail": "this interface changes nothing"})
    assert page.see(VIEW)["spec"]["name"] == "market_features"


def test_the_host_has_no_login_that_could_change_the_registry(on: Callable[[str, str], str]) -> None:
    """With the unit's own credential, past all of the interface."""
    program = (
        "import os, psycopg\n"
        "from larder.operations.credentials import Credentials\n"
        "with psycopg.connect(Credentials().registry_url) as connection:\n"
        "    for table in ('feature_views', 'projects', 'entities'):\n"
        "        try:\n"
        "            with connection.transaction(): connection.execute('DELETE FROM feast_registry.' + table)\n"
        "        except psycopg.errors.InsufficientPrivilege: print('refused')\n"
    )
    command = (
        "systemd-run --quiet --wait --collect --pipe --unit=feast-ui-test --property=Type=exec"
        " --property=LoadCredentialEncrypted=feature_store.yaml:/etc/credstore.encrypted/browse.feature_store.yaml"
        f" /opt/feast/current/bin/python -c {shlex.quote(program)}"
    )
    assert on("monitor1", command).split() == ["refused"] * 3
    assert on("monitor1", "ls /etc/credstore.encrypted").count("feature_store.yaml") == 1


@pytest.mark.parametrize("certificate", ["", "/etc/larder/tls/monitoring/current"])
def test_nobody_else_reaches_it(inventory: Any, knock: Callable[..., str], certificate: str) -> None:
    url = f"https://{inventory.address('monitor1')}:8888/"
    assert knock("stranger", url) not in {"200", "401"}
    assert knock("monitor1", url) != "200"
    if certificate:
        assert knock("monitor1", url, certificate) == "200"


def test_the_unit_is_sandboxed(on: Callable[[str, str], str]) -> None:
    on("monitor1", "systemd-analyze security --threshold=20 feast-ui.service")


def test_it_comes_back_after_it_was_killed(on: Callable[[str, str], str], page: Page) -> None:
    on("monitor1", "systemctl kill --signal=KILL feast-ui.service")
    end = time.monotonic() + 180
    while page.ask(VIEWS, password=page.tokens["viewer"])[0] != 200:
        assert time.monotonic() < end
        time.sleep(2)


def test_it_follows_a_rotation_of_its_login(
    play: Callable[..., dict[str, int]], on: Callable[[str, str], str], page: Page
) -> None:
    """The run itself ends where the former login is still in use, and proves that it is refused."""
    began = on("monitor1", "systemctl show --value --property=ActiveEnterTimestampMonotonic feast-ui.service")
    play("ansible/new_secrets.yml", "-e", "secrets=timescaledb_passwords.serve")
    play("ansible/rotate_secrets.yml", "--tags=timescaledb", "-e", "larder_drain_seconds=120")
    assert on("monitor1", "systemctl show --value --property=ActiveEnterTimestampMonotonic feast-ui.service") != began
    assert page.see(VIEWS)["featureViews"]
