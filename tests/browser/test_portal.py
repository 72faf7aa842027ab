"""The portal in a browser: a customer adds an endpoint, sees it fail, makes it right, rotates its secret."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flask_rq_webhooks.receiver import verify
from tests.browser import test_pages as operators
from tests.browser.chromium import look
from tests.browser.test_pages import API_KEYS, Walk
from tests.servers import wait_until

pytestmark = pytest.mark.timeout(300)

walk = operators.walk


def sign_in(walk: Walk, name: str) -> None:
    walk.driver.delete_all_cookies()
    walk.open("/login")
    walk.fill("token", API_KEYS[name])
    walk.press("Sign in")
    walk.wait_for("Overview")


def secret_shown(walk: Walk) -> str:
    walk.wait_for("This secret is shown once.")
    return str(walk.find("#rqw-secret").text)


@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("phone", "dark")])
def test_a_customers_whole_way(walk: Walk, size: str, scheme: str) -> None:
    """Walk at one width and check each page at both widths and in both schemes, or only walk at the other."""
    walk.size, walk.scheme = size, scheme
    check: Any = walk.check if size == "wide" else lambda name: None
    look(walk.driver, size=size, scheme=scheme)
    walk.receiver.respond = lambda received: (
        204 if received.path == "/hook/right" else (404, {"Content-Type": "text/plain"}, b"no hook at /wrong")
    )
    sign_in(walk, "acme")
    walk.wait_for("Nothing was sent yet.")
    check("overview, empty")

    walk.press("Add an endpoint")
    walk.wait_for("No endpoints yet.")
    check("endpoints, empty")
    walk.press("New endpoint")
    check("endpoint form")
    walk.fill("url", walk.receiver.url + "/wrong")
    walk.press("Create")
    old = secret_shown(walk)
    check("secret")
    walk.press("I have copied it")
    endpoint_path = walk.driver.current_url.removeprefix(walk.url)

    walk.press("Send a test ping")
    walk.wait_for("No attempts left after 1.")
    walk.wait_for("HTTP 404")
    walk.wait_for("no hook at /wrong")  # without a click: what went wrong
    check("delivery, failed")
    delivery_path = walk.driver.current_url.removeprefix(walk.url)

    walk.press("the endpoint")
    check("endpoint form, edit")
    walk.fill("url", walk.receiver.url + "/right")
    walk.press("Save")
    walk.wait_for("The changes were saved.")
    walk.open(delivery_path)
    walk.press("Send again")
    walk.wait_for("Accepted by attempt 2.")
    check("delivery")

    walk.open(endpoint_path)
    walk.press("Rotate the secret …")
    walk.press("Rotate")
    new = secret_shown(walk)
    assert new != old
    walk.press("I have copied it")
    walk.wait_for("with 2 secrets")
    walk.press("Python")
    walk.wait_for("def is_genuine")
    check("endpoint")

    answer = walk.session.post(
        f"{walk.url}/runs/blue-creek/plain/rq/api/hello_world",
        json={"fail": False},
        headers={"Authorization": f"Bearer {API_KEYS['acme']}"},
        timeout=20,
    )
    assert answer.headers["Webhook-Registered"] == "true"
    job = walk.receiver.wait_for(3)[-1]
    for secret in (old, new):
        verify(job.body, job.headers, secret)
    assert job.path == "/hook/right"
    walk.press("Deliveries")
    wait_until(
        lambda: walk.count("#rqw-deliveries .rqw-succeeded") == 2 or walk.driver.refresh(), what="both"
    )
    walk.wait_for("job.success")
    check("deliveries")
    walk.press("Overview")
    walk.wait_for("100.0 %")
    check("overview")

    # The other customer finds nothing of this.
    sign_in(walk, "umbra")
    walk.press("Endpoints")
    walk.wait_for("No endpoints yet.")
    for path in (endpoint_path, delivery_path):
        walk.open(path)
        assert re.search("Not Found", walk.text)
    assert len(walk.checked) == (10 if size == "wide" else 0)
