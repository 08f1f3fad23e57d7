"""A real browser: Debian's chromium, driven by playwright. Without it tests fail."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

PLACES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium as this machine has it, for as long as the `with` lasts."""
    found = next(filter(None, map(shutil.which, PLACES)), None)
    assert found, "there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # a container has no room in /dev/shm, and root no sandbox
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=found, args=arguments)
        try:
            yield chromium
        finally:
            chromium.close()


class Opened:
    """A file in a tab of its own, with what it said and asked for."""

    def __init__(self, browser: Browser, path: Path, *, width: int = 1200, dark: bool = False):
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": 900}
        self._context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address)

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, kind: object, *details: object) -> None:
        self._context.close()
        if kind is None:
            assert self.problems == []
            # a worker of the page's own scripts has a blob's address, and loads from nowhere
            asked = [url for url in self.requests if not url.startswith("blob:")]
            assert asked == [self.address]


def findings(page: Page) -> list[str]:
    """What axe-core calls serious or critical on a page, in words."""
    # evaluated, as the page's own policy lets no script in
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]} ({node['failureSummary']})"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
