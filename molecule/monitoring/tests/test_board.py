"""The board in a real browser, on a machine that is in no group, and what the gateway lets through to Prometheus."""

from __future__ import annotations

import base64
import http.client
import json
import math
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Browser

ROOT = Path(__file__).resolve().parents[3]
BOARD = json.loads((ROOT / "roles/monitoring/files/board/board.json").read_text())
PANELS = [panel for dashboard in BOARD["dashboards"] for panel in dashboard["panels"]]
DASHBOARDS = sorted((ROOT / "grafana/dashboards").glob("*.json"))
QUERY = "api/v1/query?query=up"

# Asks Prometheus itself, past the gateway: [[expression, time]] on standard input.
ASK = """
import json, ssl, sys, urllib.parse, urllib.request
tls = "/etc/larder/tls/monitoring/current/"
context = ssl.create_default_context(cafile=tls + "ca.crt")
context.load_cert_chain(tls + "tls.crt", tls + "tls.key")
found = []
for expr, time in json.load(sys.stdin):
    query = urllib.parse.urlencode({"query": expr, **({"time": time} if time else {})})
    with urllib.request.urlopen(sys.argv[1] + "/api/v1/query?" + query, context=context) as answer:
        found.append(json.load(answer)["data"])
print(json.dumps(found))
"""


class Gateway:
    """The gateway, asked with any path and any login; nothing is made tidy on the way."""

    def __init__(self, inventory: Any) -> None:
        self.address = inventory.address("app1")
        self.url = f"https://{self.address}:8443/board/"
        self.trusting = inventory.trusted()
        variables = inventory.variables("app1")
        self.tokens = {
            purpose: token[0] if isinstance(token, list) else token
            for purpose, token in {**variables["gateway_tokens"], **variables["monitoring_tokens"]}.items()
        }
        self.viewer = self.tokens["viewer"]

    def ask(
        self, path: str, *, method: str = "GET", basic: str = "", bearer: str = ""
    ) -> tuple[int, dict[str, str], str]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if basic:
            headers = {"Authorization": f"Basic {base64.b64encode(f'somebody:{basic}'.encode()).decode()}"}
        connection = http.client.HTTPSConnection(self.address, 8443, timeout=60, context=self.trusting)
        connection.request(method, path, headers=headers, body="" if method in {"POST", "PUT", "PATCH"} else None)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        connection.close()
        return found

    def status(self, path: str, **more: str) -> int:
        return self.ask(path, **more)[0]


@pytest.fixture(scope="module")
def gateway(inventory: Any) -> Gateway:
    return Gateway(inventory)


@pytest.fixture(scope="module")
def prometheus(inventory: Any) -> Callable[..., list[dict[str, Any]]]:
    """Ask Prometheus for expressions at a time; return what it answers to each."""
    url = f"https://{inventory.address('monitor1')}:9090"

    def ask(*expressions: str, at: float | None = None) -> list[dict[str, Any]]:
        command = shlex.join(["sudo", "python3", "-c", ASK, url])
        found: list[dict[str, Any]] = json.loads(
            inventory.run("monitor1", command, json.dumps([[expr, at] for expr in expressions]))
        )
        return found

    return ask


def until(look: Callable[[], Any], seconds: float) -> Any:
    """Look until what is seen is true or the time is over; return what was seen last."""
    end = time.monotonic() + seconds
    while not (seen := look()) and time.monotonic() < end:
        time.sleep(2)
    return seen


@contextmanager
def stopped(on: Callable[[str, str], str], host: str, unit: str) -> Iterator[None]:
    on(host, f"systemctl stop {unit}")
    try:
        yield
    finally:
        on(host, f"systemctl start {unit}")


def named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend).strip() or "all"


# The login


@pytest.mark.parametrize("path", ["/board", "/board/", "/board/board.js", f"/board/{QUERY}", "/board/-/quit"])
@pytest.mark.parametrize("login", [{}, {"basic": "wrong"}, {"bearer": "wrong"}])
def test_without_a_token_the_board_asks_for_a_login(gateway: Gateway, path: str, login: dict[str, str]) -> None:
    status, headers, _ = gateway.ask(path, **login)
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="Larder", charset="UTF-8"')


@pytest.mark.parametrize("path", ["/board/", f"/board/{QUERY}", "/board/-/quit"])
@pytest.mark.parametrize("purpose", ["reader", "writer", "monitor"])
@pytest.mark.parametrize("scheme", ["basic", "bearer"])
def test_a_token_of_another_purpose_does_not_see_the_board(
    gateway: Gateway, path: str, purpose: str, scheme: str
) -> None:
    assert gateway.status(path, **{scheme: gateway.tokens[purpose]}) == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/get-online-features"),
        ("GET", "/features/x"),
        ("POST", "/push"),
        ("GET", "/ready"),
        ("GET", "/-/quit"),
    ],
)
def test_a_viewer_sees_nothing_but_the_board(gateway: Gateway, method: str, path: str) -> None:
    assert gateway.status(path, method=method, bearer=gateway.viewer) == 403
    # A browser adds a login by itself to whatever another site lets it ask for: no login of a browser reaches features.
    for token in (gateway.viewer, gateway.tokens["writer"]):
        assert gateway.status(path, method=method, basic=token) == 401


@pytest.mark.parametrize("path", ["/board/", "/board/board.json", f"/board/{QUERY}", "/board/api/v1/rules"])
@pytest.mark.parametrize("scheme", ["basic", "bearer"])
def test_a_viewer_sees_the_board(gateway: Gateway, path: str, scheme: str) -> None:
    assert gateway.status(path, **{scheme: gateway.viewer}) == 200


@pytest.mark.parametrize("path", ["/board/", f"/board/{QUERY}", "/board/api/v1/query_range", "/board/-/quit"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_nothing_but_get_is_passed_on(gateway: Gateway, method: str, path: str) -> None:
    assert gateway.status(path, method=method, basic=gateway.viewer) == 404


@pytest.mark.parametrize(
    "path",
    [
        "-/quit",
        "-/reload",
        "-/ready",
        "metrics",
        "graph",
        "debug/pprof/",
        "consoles/",
        "user/board.js",
        "api/v1/admin/tsdb/snapshot",
        "api/v1/status/config",
        "api/v1/status/flags",
        "api/v1/targets",
        "api/v1/series",
        "api/v1/alertmanagers",
        "api/v1/write",
        "api/v1/read",
        "api/v1/query/",
        "api/v1/query/../status/config",
        "api/v1/query%2f..%2fstatus%2fconfig",
        "../api/v1/status/config",
        "..%2fapi%2fv1%2fstatus%2fconfig",
        "%2e%2e/api/v1/status/config",
        "board.js/../../api/v1/status/config",
        ".web.yml",
        "/api/v1/status/config",
    ],
)
def test_no_other_path_of_prometheus_is_reached(gateway: Gateway, path: str) -> None:
    assert gateway.status(f"/board/{path}", basic=gateway.viewer) == 404


def test_prometheus_still_runs_and_takes_nobody_without_a_certificate(inventory: Any, prometheus: Any) -> None:
    assert prometheus("vector(1)")[0]["result"][0]["value"][1] == "1"
    script = "import socket; socket.create_connection((__import__('sys').argv[1], 9090), timeout=3)"
    command = shlex.join(["python3", "-c", script, inventory.address("monitor1")])
    assert inventory.host("stranger").run(command).rc != 0


def test_the_page_may_load_nothing_from_elsewhere(gateway: Gateway) -> None:
    for path, cache in (("", "no-cache"), ("board.js", "no-cache"), ("api/v1/rules", "no-store")):
        _, headers, _ = gateway.ask(f"/board/{path}", basic=gateway.viewer)
        policy = headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} <= {*policy}
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == cache
        assert "access-control-allow-origin" not in headers


def test_the_token_is_in_no_journal(inventory: Any, gateway: Gateway) -> None:
    gateway.status("/board/-/quit", basic=gateway.viewer)
    journal = inventory.host("app1").check_output("journalctl --unit=haproxy --no-pager -o cat --since=-1h")
    assert " viewer GET /board/-/quit 404 " in journal
    assert gateway.viewer not in journal
    assert base64.b64encode(f"somebody:{gateway.viewer}".encode()).decode() not in journal


# The page


def test_the_page_loads_without_a_complaint(browser: Browser, gateway: Gateway) -> None:
    seen = browser.open()
    assert seen["complaints"] == []
    assert not seen["stale"]
    assert {method for method, _, _ in seen["asked"]} == {"GET"}
    assert all(url.startswith(gateway.url) for _, url, _ in seen["asked"])
    # The first answer asks for the login.
    assert [status for _, _, status in seen["asked"] if status != 200] in ([401], [])


@pytest.mark.parametrize(
    ("scheme", "width", "height", "background"),
    [("dark", 1440, 900, "rgb(14, 19, 25)"), ("light", 390, 844, "rgb(244, 246, 249)")],
    ids=["dark and wide", "light on a phone"],
)
def test_the_page_fits(browser: Browser, scheme: str, width: int, height: int, background: str) -> None:
    seen = browser.open(scheme=scheme, width=width, height=height)
    assert not seen["wider"]
    assert seen["background"] == background
    browser.picture(f"board-{scheme}.png", whole=False)


def asked(prometheus: Any, panels: list[dict[str, Any]], at: float | None = None) -> dict[str, dict[str, float]]:
    """Return what Prometheus answers to each panel: the value of each series, by its name."""
    queries = [(panel["title"], query) for panel in panels for query in panel["queries"]]
    found: dict[str, dict[str, float]] = {panel["title"]: {} for panel in panels}
    answers = prometheus(*(query["expr"] for _, query in queries), at=at)
    for (title, query), answer in zip(queries, answers, strict=True):
        for sample in answer["result"]:
            found[title][named(query["legend"], sample["metric"])] = float(sample["value"][1])
    return found


def test_every_number_is_prometheus_own(browser: Browser, prometheus: Any) -> None:
    shown = [panel for panel in PANELS if panel["kind"] != "graph"]

    def wrong() -> list[str]:
        panels = browser.open()["panels"]
        [at] = {panels[panel["title"]]["time"] for panel in shown}
        expected = asked(prometheus, shown, at)
        found = []
        for panel in shown:
            numbers = {name: value for name, value in expected[panel["title"]].items() if not math.isnan(value)}
            told = {
                row["name"] or named(panel["queries"][0]["legend"], {}): float(row["value"])
                for row in panels[panel["title"]]["rows"]
                if row["value"] is not None
            }
            if told != numbers:
                found.append(f"{panel['title']}: {told} instead of {numbers}")
        return found

    # A sample that is stored after the page has asked may be of a time before: then the next look agrees.
    looks = [wrong()]
    while looks[-1] and len(looks) < 4:
        looks.append(wrong())
    assert looks[-1] == []


def test_every_graph_has_the_series_of_prometheus(browser: Browser, prometheus: Any) -> None:
    graphs = [panel for panel in PANELS if panel["kind"] == "graph"]
    panels: dict[str, Any] = {}

    def lacking() -> dict[str, set[str]]:
        # Asked first: a series may begin before the page asks.
        answers = asked(prometheus, graphs).items()
        panels.update(browser.open()["panels"])
        wanted = {title: {name for name, value in series.items() if not math.isnan(value)} for title, series in answers}
        return {title: names - {*panels[title]["legend"]} for title, names in wanted.items()}

    assert until(lambda: not any(lacking().values()), 60), lacking()
    for title in (panel["title"] for panel in graphs):
        assert panels[title]["drawn"] == (1 if panels[title]["legend"] else 0), title


def test_every_question_has_an_answer_where_the_stack_has_the_thing(prometheus: Any) -> None:
    panels = [panel for panel in PANELS if "absent" not in panel]
    empty = until_answered(prometheus, [query["expr"] for panel in panels for query in panel["queries"]])
    assert empty == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_question_of_a_grafana_dashboard_is_one_of_prometheus(path: Path, prometheus: Any) -> None:
    panels = {panel["title"]: panel for panel in PANELS}
    dashboard = json.loads(path.read_text())
    targets = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    assert targets
    empty = until_answered(prometheus, [expr for title, expr in targets if "absent" not in panels[title]])
    assert empty == []


def until_answered(prometheus: Any, expressions: list[str]) -> list[str]:
    """Return the expressions that have no series after a while; one that Prometheus refuses fails the test."""
    empty = expressions

    def answered() -> bool:
        nonlocal empty
        empty = [expr for expr, answer in zip(empty, prometheus(*empty), strict=True) if not answer["result"]]
        return not empty

    until(answered, 60)
    return empty


def test_an_absent_metric_is_never_well(browser: Browser) -> None:
    # The scenario has no backup host.
    panel = browser.open()["panels"]["Last backup"]
    assert (panel["state"], panel["nothing"], panel["rows"]) == ("unknown", "no data", [])


def test_what_is_wrong_is_the_first_line_with_what_to_do(on: Callable[[str, str], str], browser: Browser) -> None:
    with stopped(on, "store1", "prometheus-node-exporter"):

        def firing() -> dict[str, Any] | None:
            seen = browser.open()
            return seen if any(problem["alert"] == "TargetDown" for problem in seen["problems"]) else None

        seen = until(firing, 120)
        assert seen, "TargetDown is not shown"
        [problem] = [problem for problem in seen["problems"] if problem["alert"] == "TargetDown"]
        assert problem["text"].startswith("node_exporter on store1 does not answer")
        assert seen["level"] == "critical"
        assert "node_exporter on store1 does not answer" in seen["said"] or re.match(r"\d+ alerts: ", seen["said"])
        assert seen["title"] == f"{seen['said']} · Larder"
        assert {row["name"]: row["mark"] for row in seen["panels"]["Answering, by job"]["rows"]}[
            "node_exporter"
        ] == "critical"
        browser.do(do="click", selector='li[data-alert="TargetDown"] summary')
        opened = browser.do(do="wait", selector='li[data-alert="TargetDown"] .runbook pre', seconds=30)
        [problem] = [problem for problem in opened["problems"] if problem["alert"] == "TargetDown"]
        assert "systemctl status UNIT" in problem["runbook"]
        browser.picture("board-alert.png")
    assert until(lambda: all(problem["alert"] != "TargetDown" for problem in browser.open()["problems"]), 120)


def test_a_page_whose_prometheus_does_not_answer_says_so(
    on: Callable[[str, str], str], browser: Browser, gateway: Gateway
) -> None:
    assert not browser.open()["stale"]
    with stopped(on, "monitor1", "prometheus"):
        seen = browser.do(do="wait", selector="body.stale", seconds=120)
        assert (seen["said"], seen["level"], seen["grey"]) == ("Prometheus does not answer", "unknown", "grayscale(1)")
        assert "may not hold any more" in seen["when"]
        assert seen["title"] == "Prometheus does not answer · Larder"
        browser.picture("board-stale.png")
        status, _, text = gateway.ask("/board/", basic=gateway.viewer)
        assert status == 503
        assert "Prometheus does not answer" in text
    again = browser.do(do="wait", selector="body:not(.stale)", seconds=120)
    assert again["said"] != "Prometheus does not answer"
