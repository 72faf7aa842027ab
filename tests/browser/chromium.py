"""Headless Chromium for tests and screenshots: no download, an empty profile, no talk of its own.

Needs Debian's ``chromium`` and ``chromium-driver`` or their like on the PATH, and npm for axe-core.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.servers import ROOT

#: Where axe-core is kept between runs; ignored by git.
AXE_DIR = ROOT / "build" / "axe"

SIZES = {"wide": (1280, 900), "phone": (390, 844)}

#: Runs before anything of the page: what a page must never cause is written down.
_RECORDER = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(event.violatedDirective + " " + event.blockedURI + " " + event.sample));
window.alert = window.confirm = window.prompt = (text) => window.violations.push("dialog " + text);
"""


class Missing(Exception):
    """Something the browser tests need is not on this machine."""


def find_chromium() -> tuple[str, str]:
    """Return the paths of browser and driver.

    :raises Missing: when either is not there.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        browser, driver = shutil.which(name), shutil.which("chromedriver")
        if browser and driver:
            return browser, driver
    raise Missing("chromium and chromedriver are not on the PATH (Debian: chromium, chromium-driver)")


def find_axe() -> str:
    """Return the source of axe-core, from npm at the first time.

    :raises Missing: when npm is not there or cannot get it.
    """
    script = AXE_DIR / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        if shutil.which("npm") is None:
            raise Missing("npm is not on the PATH, which axe-core comes with")
        AXE_DIR.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "install", "--prefix", str(AXE_DIR), "--no-save", "--ignore-scripts", "--no-audit",
             "--no-fund", "axe-core@4"],
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        if not script.exists():
            raise Missing(f"npm cannot get axe-core: {done.stderr[-300:]}")
    return script.read_text()


@contextmanager
def open_chromium() -> Iterator[webdriver.Chrome]:
    """Start a browser with an empty profile; end it with its driver.

    :raises Missing: when there is none.
    """
    browser, driver_path = find_chromium()
    profile = Path(tempfile.mkdtemp(prefix="rqw-chromium-"))
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(driver_path))
        try:
            driver.set_page_load_timeout(30)
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _RECORDER})
            yield driver
        finally:
            driver.quit()
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def look(
    driver: webdriver.Chrome, *, size: str = "wide", scheme: str = "light", height: int | None = None
) -> None:
    """Make the window of one of :data:`SIZES`, and let the reader prefer *scheme*."""
    width, usual = SIZES[size]
    height = height or usual
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme},
                      {"name": "prefers-reduced-motion", "value": "reduce"}]},
    )  # fmt: skip


def axe_violations(
    driver: webdriver.Chrome, axe: str, *, rules: Sequence[str] = (), within: str = "html"
) -> list[str]:
    """Return what axe finds on the page, one line each; nothing without its source.

    :param rules: only these; all of them by default.
    :param within: selector of the part that is looked at.
    """
    if not axe:
        return []
    if driver.execute_script("return typeof axe === 'undefined'"):
        # By the protocol, not by a script element: the page's policy stays in force.
        driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    found: Any = driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "const options = arguments[0].length ? {runOnly: arguments[0]} : {};"
        "axe.run(arguments[1], options).then((r) => done(r.violations.flatMap((v) => v.nodes.map((n) =>"
        " v.id + ': ' + n.html.slice(0, 200) + ' – ' + n.failureSummary))), (e) => done([String(e)]));",
        list(rules),
        within,
    )
    return [str(line) for line in found]


def policy_violations(driver: webdriver.Chrome) -> list[str]:
    """Return what the page's policy blocked and what a script would have shown, since the page was loaded."""
    recorded: list[str] = driver.execute_script("return window.violations")
    logged = [
        entry["message"]
        for entry in driver.get_log("browser")
        if "Content Security Policy" in entry["message"] or "Uncaught" in entry["message"]
    ]
    return recorded + logged
