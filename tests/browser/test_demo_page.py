"""The page that ``make demo`` prints: a visitor submits jobs and watches their webhooks arrive."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from selenium.webdriver.common.by import By

from tests.browser.chromium import axe_violations, look, policy_violations
from tests.servers import Process, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def link() -> Iterator[str]:
    """Run the demo; give the link it prints for the example app."""
    with Process("python", "-m", "example_app.demo", "--serve", env={}) as demo:
        demo.wait_for_output("demo: 3 of 3", timeout=90)
        found = re.search(r"example app +(\S+)", demo.output)
        assert found is not None, demo.output
        yield found[1]


def check(driver: Any, axe: str) -> None:
    """Let axe judge the page at both widths; nothing may scroll sideways."""
    for size, scheme in (("wide", "light"), ("phone", "dark")):
        look(driver, size=size, scheme=scheme)
        assert axe_violations(driver, axe) == [], (driver.current_url, size)
        sideways = driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert sideways <= 0, (driver.current_url, size)
    look(driver)
    assert policy_violations(driver) == []


def submit(driver: Any, job: str, receiver: str) -> None:
    driver.find_element(By.CSS_SELECTOR, f"[name=job][value={job}]").click()
    driver.find_element(By.CSS_SELECTOR, f"[name=receiver][value={receiver}]").click()
    driver.find_element(By.CSS_SELECTOR, "button").click()
    wait_until(lambda: "/submitted/" in driver.current_url, what="the page of the run")


def text(driver: Any) -> str:
    return str(driver.execute_script("return document.body.innerText"))


def test_a_visitor_submits_and_watches(chromium: Any, axe: str, link: str) -> None:
    look(chromium)
    chromium.get(link)
    assert "token" not in chromium.current_url
    assert "you are signed in" in text(chromium)
    check(chromium, axe)

    # A receiver that fails twice: the page renews itself without being loaded again.
    submit(chromium, "failure", "flaky")
    chromium.execute_script("window.loaded_once = true")
    check(chromium, axe)
    wait_until(lambda: "The webhook was delivered." in text(chromium), timeout=40, what="the delivery")
    assert chromium.execute_script("return window.loaded_once")
    for words in ("Attempt 1, answered 503", "Attempt 3, answered 204", "Signature verified", "job.failure"):
        assert words in text(chromium)
    check(chromium, axe)

    # The links to the dashboard lead in.
    chromium.find_element(By.LINK_TEXT, "details").click()
    wait_until(lambda: "Attempt 3" in text(chromium), what="the page of the delivery")
    chromium.back()
    chromium.find_element(By.LINK_TEXT, "Dashboard").click()
    wait_until(lambda: "/webhooks/" in chromium.current_url and "Deliveries" in text(chromium))
    chromium.delete_all_cookies()


def test_it_works_without_javascript(link: str) -> None:
    """Post the form and follow the reloads the page asks for, as a browser without JavaScript does."""
    with requests.Session() as browser:
        browser.trust_env = False
        home = browser.get(link, timeout=10)
        page = browser.post(home.url, data={"job": "killed", "receiver": "good"}, timeout=10)
        deadline = time.monotonic() + 60
        while refresh := re.search(r'<noscript><meta http-equiv="refresh" content="(\d+)">', page.text):
            assert time.monotonic() < deadline, page.text
            time.sleep(int(refresh[1]))
            page = browser.get(page.url, timeout=10)
    assert "The webhook was delivered." in page.text
    assert "Signature verified" in page.text
    assert "job.failure" in page.text
    assert "reconciled" in page.text  # the work-horse was killed, so no callback ran
