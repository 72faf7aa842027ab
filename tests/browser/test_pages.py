"""The pages in a browser: the example app walked by an operator, and what strangers wrote on every page."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.browser.chromium import axe_violations, look, policy_violations
from tests.browser.screenshots import served
from tests.dashboard_app import add_endpoint, add_hostile, open_host
from tests.integration.test_dashboard import MANAGED_PAGES, PAGES, filled
from tests.servers import Process, Receiver, rq_worker, wait_until

TOKEN = "what operators know"
API_KEYS = {"acme": "key-of-acme", "umbra": "key-of-umbra"}
#: Size, scheme, and which rules of axe: all of them at every width; the other scheme has only other colours.
LOOKS: list[tuple[str, str, tuple[str, ...]]] = [
    ("wide", "light", ()),
    ("wide", "dark", ("color-contrast",)),
    ("phone", "light", ("color-contrast",)),
    ("phone", "dark", ()),
]

pytestmark = pytest.mark.timeout(300)


@dataclass
class Walk:
    """A browser on the example app, and the receiver its webhooks go to."""

    driver: Any
    axe: str
    url: str
    receiver: Receiver
    session: requests.Session
    checked: set[str] = field(default_factory=set)
    size: str = "wide"
    scheme: str = "light"

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    @property
    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def wait_for(self, text: str, timeout: float = 40) -> None:
        """Wait until the page shows *text* without being loaded again: it refreshes itself."""
        wait_until(lambda: text in self.text, timeout=timeout, what=f"{text!r} in {self.text[:2000]!r}")

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def press(self, words: str) -> None:
        """Press a button or follow a link by its words, as a person would find it."""
        # Found and pressed in one script: the page may take over a part of itself at any moment.
        pressed = self.driver.execute_script(
            "const found = [...document.querySelectorAll('button, a, summary')].find((element) =>"
            " element.checkVisibility() && element.innerText.trim() === arguments[0]);"
            "if (found) setTimeout(() => found.click()); return Boolean(found);",
            words,
        )
        assert pressed, f"no {words!r} on {self.driver.current_url}: {self.text[:1500]}"
        time.sleep(0.05)
        wait_until(
            lambda: self.driver.execute_script("return document.readyState") == "complete",
            what=f"the page after {words!r}",
        )

    def follow(self, selector: str) -> None:
        """Follow the first link that matches."""
        self.driver.get(
            self.driver.execute_script("return document.querySelector(arguments[0]).href", selector)
        )

    def count(self, selector: str) -> int:
        return int(
            self.driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)
        )

    def fill(self, name: str, text: str) -> None:
        element = self.find(f"[name={name}]:not([type=hidden])")
        element.clear()
        element.send_keys(text)

    def check(self, name: str) -> None:
        """Let axe and the policy judge what is shown now, in every size and scheme."""
        self.checked.add(name)
        self.driver.execute_script(
            "window.opened = [...document.querySelectorAll('.rqw details:not([open])')];"
            "opened.forEach((element) => element.open = true)"
        )
        for size, scheme, rules in LOOKS:
            look(self.driver, size=size, scheme=scheme)
            assert axe_violations(self.driver, self.axe, rules=rules) == [], (name, size, scheme)
            sideways = self.driver.execute_script(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert sideways <= 0, (name, size, "the page scrolls sideways")
        look(self.driver, size=self.size, scheme=self.scheme)
        self.driver.execute_script("opened.forEach((element) => element.open = false)")
        assert policy_violations(self.driver) == [], name

    def submit_job(self, runid: str, path: str) -> str:
        response = self.session.post(
            f"{self.url}/runs/{runid}/plain/rq/api/hello_world",
            json={"fail": False, "webhook_url": self.receiver.url + path, "webhook_secret": "s"},
            timeout=20,
        )
        assert response.headers["Webhook-Registered"] == "true", response.text
        return str(response.json()["job_id"])


@pytest.fixture
def walk(chromium: Any, axe: str, redis_url: str, tmp_path: Path) -> Iterator[Walk]:
    environment = {
        "REDIS_URL": redis_url,
        "EXAMPLE_DATABASE_URI": f"sqlite:///{tmp_path / 'watershed.db'}",
        "EXAMPLE_RUNS_DIR": str(tmp_path / "runs"),
        "EXAMPLE_TOKEN": TOKEN,
        "EXAMPLE_CUSTOMERS": " ".join(f"{name}={key}" for name, key in API_KEYS.items()),
        "ALLOW_HTTP": "1",
        "SECRET_KEY": "one for all processes",
        "WEPPCLOUD_WEBHOOK_RETRY_COUNT": "2",
    }
    with ExitStack() as cleanup:
        app = "example_app.app:app"
        server = cleanup.enter_context(Process("python", "-m", "example_app.serve", app, env=environment))
        server.wait_for_output("serving on")
        found = re.search(r"serving on (\S+)", server.output)
        assert found is not None
        cleanup.enter_context(
            Process("python", "-m", "flask", "--app", app, "rq-webhooks", "worker", env=environment)
        )
        cleanup.enter_context(rq_worker(redis_url, env=environment))
        receiver = cleanup.enter_context(Receiver())
        session = cleanup.enter_context(requests.Session())
        session.trust_env = False
        look(chromium)
        yield Walk(chromium, axe, found[1], receiver, session)
        chromium.delete_all_cookies()
        chromium.get("about:blank")


def test_axe_is_at_hand_and_sees_a_violation(chromium: Any, axe: str) -> None:
    """Without it the other tests here ask everything but axe."""
    if not axe:
        pytest.skip("npm cannot get axe-core here")
    chromium.get("data:text/html,<html><img src=x></html>")
    assert any(line.startswith("image-alt") for line in axe_violations(chromium, axe))
    chromium.get("data:text/html,<html><img src=x><p style='color: %23ddd; background: %23fff'>pale</html>")
    (found,) = axe_violations(chromium, axe, rules=["color-contrast"])
    assert found.startswith("color-contrast: <p")


def test_an_operator_walks_every_page_and_action(walk: Walk) -> None:
    walk.open("/webhooks/")
    walk.wait_for("permission")  # not signed in
    walk.open("/login")
    walk.fill("token", TOKEN)
    walk.press("Sign in")
    wait_until(lambda: "No dispatcher is alive" not in walk.text, what="the alarm goes by itself")
    walk.check("overview, empty")

    # Create an endpoint; the secret is shown once.
    walk.press("Endpoints")
    walk.check("endpoints, empty")
    walk.press("New endpoint")
    walk.check("endpoint form")
    walk.fill("url", "http://10.1.2.3/internal")
    walk.fill("description", "Run archive")
    walk.press("Create")
    walk.wait_for("Nothing was saved")
    walk.check("endpoint form, refused")
    walk.fill("url", walk.receiver.url)
    walk.find("[name=events][value='job.success']").click()
    walk.press("Create")
    walk.wait_for("whsec_")
    walk.check("secret")
    walk.press("I have copied it")
    endpoint_path = walk.driver.current_url.removeprefix(walk.url)

    # Test ping, delivered while we look.
    walk.press("Send a test ping")
    walk.wait_for("A test ping is on its way")
    walk.wait_for("Accepted by attempt 1.")
    walk.check("delivery, ping")
    (ping,) = walk.receiver.wait_for(1)
    assert b"webhook.ping" in ping.body

    # A receiver that fails, with an answer that would like to be a page.
    walk.receiver.respond = lambda received: (
        500, {"Content-Type": "text/html", "Server": "<script>x</script>"},
        b"<script>window.hacked = 1</script><h1>no</h1>",
    )  # fmt: skip
    job_id = walk.submit_job("blue-creek", "/own")
    walk.receiver.wait_for(5)  # two endpoints, two attempts each, after the ping
    walk.open("/webhooks/deliveries")
    walk.wait_for("exhausted")
    walk.check("deliveries")
    walk.open(f"/webhooks/deliveries?job_id={job_id}")
    wait_until(lambda: walk.count("#rqw-deliveries .rqw-exhausted") == 2, what="both are exhausted, live")
    walk.follow("#rqw-deliveries tbody a")
    walk.wait_for("No attempts left after 2.")
    walk.wait_for("Attempt 2 failed")
    walk.wait_for("Attempt 1 failed")
    walk.wait_for("<h1>no</h1>")
    walk.wait_for("finished in queue default")
    walk.check("delivery, exhausted")
    assert walk.driver.execute_script("return window.hacked") is None
    delivery_path = walk.driver.current_url.removeprefix(walk.url)

    # The host's own job page.
    walk.open(f"/runs/blue-creek/plain/jobs/{job_id}")
    walk.wait_for("Failed: no attempts left.")
    assert axe_violations(walk.driver, walk.axe) == []

    # The receiver is repaired: sent again, seen without loading the page again.
    walk.receiver.respond = lambda received: 204
    walk.open(delivery_path)
    walk.press("Send again")
    walk.wait_for("Accepted by attempt 3.")
    walk.wait_for("manual")
    walk.follow(".rqw-facts a")
    walk.wait_for("Stored event")
    walk.check("event")

    # Many fail; all are recovered by a filter.
    walk.receiver.respond = lambda received: 404
    before = len(walk.receiver.received)
    for number in range(4):
        walk.submit_job(f"many-{number}", "/own")
    walk.receiver.wait_for(before + 8)
    walk.open("/webhooks/deliveries?status=exhausted")
    wait_until(
        lambda: (
            len(walk.driver.find_elements(By.CSS_SELECTOR, "#rqw-deliveries tbody tr")) == 9
            or walk.driver.refresh()
        ),
        what="nine exhausted deliveries",
    )
    walk.receiver.respond = lambda received: 204
    walk.press("Send again …")
    walk.press("Send again")
    walk.wait_for("9 deliveries are due now")
    walk.receiver.wait_for(before + 8 + 9)
    wait_until(
        lambda: walk.count("#rqw-deliveries .rqw-succeeded") == walk.count("#rqw-deliveries tbody tr"),
        what="all succeeded, live",
    )

    # Pause, and cancel what waits.
    walk.open("/webhooks/")
    walk.press("Pause all sending")
    walk.wait_for("All sending is paused")
    waiting = walk.submit_job("paused", "/own")
    walk.open(f"/webhooks/deliveries?job_id={waiting}")
    wait_until(
        lambda: walk.count("#rqw-deliveries .rqw-pending") == 2 or walk.driver.refresh(), what="they wait"
    )
    walk.check("deliveries, paused")
    walk.press("Cancel what is waiting …")
    walk.press("Cancel")
    walk.wait_for("2 deliveries were canceled.")
    walk.open("/webhooks/")
    walk.press("Resume sending")
    walk.wait_for("Sending is resumed.")
    walk.check("overview")

    # Edit, rotate, disable, enable, delete.
    walk.open(endpoint_path)
    walk.press("Edit")
    walk.check("endpoint form, edit")
    walk.fill("description", "Archive of runs")
    walk.press("Save")
    walk.wait_for("Archive of runs")
    walk.press("Rotate the secret …")
    walk.press("Rotate")
    walk.wait_for("The old secret also signs for 1 d.")
    walk.press("I have copied it")
    walk.press("Disable …")
    walk.press("Disable")
    walk.wait_for("Disabled since")
    walk.check("endpoint, disabled")
    walk.press("Enable")
    walk.wait_for("The endpoint is enabled.")
    walk.check("endpoint")
    walk.press("Endpoints")
    walk.check("endpoints")
    walk.press("From requests")
    walk.check("endpoints from requests")
    walk.follow(".rqw-table tbody a")
    walk.wait_for("Endpoint from a request")
    walk.check("endpoint from a request")
    walk.open(endpoint_path)
    walk.press("Delete …")
    walk.press("Delete")
    walk.wait_for("The endpoint and its deliveries were deleted.")
    assert len(walk.checked) == 17


@pytest.mark.parametrize("size", ["wide", "phone"])
def test_hostile_text_runs_nowhere(
    chromium: Any, axe: str, sqlite_url: str, redis_url: str, size: str
) -> None:
    with open_host(sqlite_url, redis_url, {"read", "manage", "status"}) as (app, state):
        ids = add_hostile(state)
        add_endpoint(state, "https://hooks.example.com/in", kind="job", runid="<b>")
        with served(app) as url:
            script = "%22%3E%3Cscript%3Ewindow.hacked=1%3C/script%3E"
            made_up = [f"/deliveries?q={script}", f"/deliveries?done=recovered&n=9&left=5&next={script}"]
            for path in (*PAGES, *MANAGED_PAGES, *made_up):
                look(chromium, size=size)
                chromium.get(f"{url}/webhooks{filled(path, ids)}")
                chromium.execute_script(
                    "document.querySelectorAll('details').forEach((element) => element.open = true)"
                )
                assert chromium.execute_script("return window.hacked") is None, path
                assert policy_violations(chromium) == [], path
                assert chromium.execute_script("return document.images.length") == 0
                assert axe_violations(chromium, axe) == [], path


def test_the_policy_would_report_a_script(chromium: Any, sqlite_url: str, redis_url: str) -> None:
    """What the other tests rely on to see nothing sees something where there is something."""
    with open_host(sqlite_url, redis_url, {"read"}) as (app, _state), served(app) as url:
        chromium.get(f"{url}/webhooks/")
        chromium.execute_script(
            "const element = document.createElement('div');"
            "element.innerHTML = '<img src=x onerror=\"window.hacked=1\">';"
            "document.body.append(element);"
        )
        wait_until(lambda: policy_violations(chromium), what="a report of the policy")
        assert chromium.execute_script("return window.hacked") is None
        chromium.get("about:blank")


def test_everything_is_done_with_the_keyboard(chromium: Any, sqlite_url: str, redis_url: str) -> None:
    with open_host(sqlite_url, redis_url, {"read", "manage"}) as (app, state):
        endpoint_id = add_endpoint(state)
        with served(app) as url:
            look(chromium)
            chromium.get(f"{url}/webhooks/endpoints/{endpoint_id}")
            body = chromium.find_element(By.TAG_NAME, "body")
            body.send_keys(Keys.TAB)
            assert chromium.switch_to.active_element.text == "Skip to the page"
            chromium.switch_to.active_element.send_keys(Keys.ENTER)
            for _ in range(30):
                chromium.switch_to.active_element.send_keys(Keys.TAB)
                if chromium.switch_to.active_element.text == "Disable …":
                    break
            chromium.switch_to.active_element.send_keys(Keys.ENTER, Keys.TAB)
            assert chromium.switch_to.active_element.text == "Disable"
            ring = chromium.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid"
            chromium.switch_to.active_element.send_keys(Keys.ENTER)
            wait_until(lambda: "Disabled since" in chromium.page_source, what="the form was sent")


def test_pages_work_without_our_script(chromium: Any, sqlite_url: str, redis_url: str) -> None:
    with open_host(sqlite_url, redis_url, {"read", "manage"}) as (app, state):
        endpoint_id = add_endpoint(state)
        with served(app) as url:
            # Scripts as such cannot be switched off: the driver needs them to find elements.
            chromium.execute_cdp_cmd("Network.enable", {})
            chromium.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*.js"]})
            try:
                chromium.get(f"{url}/webhooks/endpoints/{endpoint_id}")
                assert not chromium.find_element(By.ID, "rqw-live-note").is_displayed()
                chromium.find_element(By.CSS_SELECTOR, "form[action$=test] button").click()
                wait_until(lambda: "A test ping is on its way" in chromium.page_source)
                chromium.find_element(By.CSS_SELECTOR, "form[action$=resend] button").click()
                wait_until(lambda: "The delivery is due now" in chromium.page_source)
            finally:
                chromium.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
