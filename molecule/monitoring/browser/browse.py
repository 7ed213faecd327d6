"""A person with a browser, on a machine that is in no group: a command a line, and what it sees, a line.

Commands are JSON: `open` with `url`, `password`, `scheme`, `width`, `height`, and with `until`, a selector to wait
for, where the page is another one than the board; `look`; `wait` with `selector` and `seconds`; `click` with
`selector`; `picture`, which is answered with a PNG.
"""

import base64
import json
import sys

from playwright.sync_api import Browser, Page, sync_playwright

# What a person sees, and where each number is from.
LOOK = """() => {
  const text = (element, selector) => element.querySelector(selector)?.textContent ?? null;
  const rows = (panel) => [...panel.querySelectorAll(".row")].map((row) => ({
    name: text(row, ".of"),
    text: text(row, "data"),
    value: row.querySelector("data").getAttribute("value"),
    mark: row.querySelector(".mark").getAttribute("aria-label"),
  }));
  return {
    title: document.title,
    said: document.getElementById("said").textContent,
    level: document.getElementById("verdict").className,
    when: document.getElementById("when").textContent,
    stale: document.body.classList.contains("stale"),
    grey: getComputedStyle(document.querySelector("main")).filter,
    background: getComputedStyle(document.body).backgroundColor,
    wider: document.documentElement.scrollWidth > window.innerWidth,
    problems: [...document.querySelectorAll("#problems li")].map((line) => ({
      alert: line.dataset.alert ?? null,
      text: text(line, ".text"),
      runbook: [...line.querySelectorAll(".runbook > :not(summary)")].map((part) => part.textContent).join("\\n"),
    })),
    panels: Object.fromEntries([...document.querySelectorAll(".panel")].map((panel) => [panel.dataset.panel, {
      state: panel.classList[2],
      time: Number(panel.dataset.time),
      nothing: text(panel, ".nothing"),
      rows: rows(panel),
      drawn: panel.querySelectorAll("canvas").length,
      legend: [...panel.querySelectorAll(".legend .of")].map((name) => name.textContent),
    }])),
  };
}"""
PATIENCE = 120_000  # milliseconds; many scenarios share a machine


class Reader:
    """One browser, and the page that it has open."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.page: Page | None = None
        self.complaints: list[str] = []
        self.asked: list[list[object]] = []

    def open(
        self,
        url: str,
        password: str,
        scheme: str = "dark",
        width: int = 1440,
        height: int = 900,
        until: str = "#when:not(:empty)",
    ) -> None:
        if self.page:
            self.page.context.close()
        context = self.browser.new_context(
            http_credentials={"username": "somebody", "password": password},
            color_scheme=scheme,
            viewport={"width": width, "height": height},
        )
        context.set_default_timeout(PATIENCE)
        context.set_default_navigation_timeout(PATIENCE)
        self.complaints, self.asked = [], []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"{request.url}: {request.failure}"))
        self.page.on("response", lambda answer: self.asked.append([answer.request.method, answer.url, answer.status]))
        self.page.goto(url)
        self.page.locator(until).first.wait_for()

    def do(self, command: dict[str, object]) -> object:
        what = command.pop("do")
        if what == "open":
            self.open(**command)  # type: ignore[arg-type]
        assert self.page
        if what == "wait":
            self.page.locator(str(command["selector"])).first.wait_for(timeout=float(str(command["seconds"])) * 1000)
        elif what == "click":
            self.page.locator(str(command["selector"])).first.click()
        elif what == "picture":
            return {"png": base64.b64encode(self.page.screenshot(full_page=bool(command.get("whole")))).decode()}
        if "until" in command:
            return {"text": self.page.inner_text("body"), "complaints": self.complaints, "asked": self.asked}
        return {**self.page.evaluate(LOOK), "complaints": self.complaints, "asked": self.asked}


def main() -> None:
    with sync_playwright() as playwright:
        # A container has no user namespaces for chromium's own sandbox.
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        reader = Reader(browser)
        for line in sys.stdin:
            print(json.dumps(reader.do(json.loads(line))), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
