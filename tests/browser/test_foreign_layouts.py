"""The pages inside layouts of other apps, in a browser: axe, nothing sideways, filters and times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from jinja2 import DictLoader
from selenium.webdriver.common.by import By

from tests.browser.chromium import axe_violations, look
from tests.browser.screenshots import served
from tests.dashboard_app import add_deliveries, add_delivery, add_endpoint, open_host
from tests.foreign_layouts import LAYOUTS, host_names
from tests.servers import wait_until

pytestmark = pytest.mark.timeout(300)


@contextmanager
def host_with(layout: str, sqlite_url: str, redis_url: str) -> Iterator[tuple[str, str, str]]:
    """Give the URL of a served host whose pages appear in a layout, and an endpoint and a delivery of it."""
    may = {"read", "manage", "status"}
    with open_host(sqlite_url, redis_url, may, RQ_WEBHOOKS_BASE_TEMPLATE="layout.html") as (app, state):
        app.jinja_loader = DictLoader({"layout.html": layout})
        app.context_processor(host_names)
        app.jinja_env.globals["csrf_token"] = lambda: "of the host"
        endpoint_id = add_endpoint(state, description="Archive of runs")
        add_deliveries(state, endpoint_id, 5)
        delivery_id = add_delivery(state, endpoint_id, job_id="the-one", runid="run-1")
        with served(app) as url:
            yield f"{url}/webhooks", endpoint_id, delivery_id


def sideways(chromium: Any) -> int:
    return int(
        chromium.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
    )


@pytest.mark.parametrize("size", ["wide", "phone"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_pages_within_a_foreign_layout(
    chromium: Any, axe: str, sqlite_url: str, redis_url: str, layout: str, size: str
) -> None:
    with host_with(LAYOUTS[layout], sqlite_url, redis_url) as (url, endpoint_id, delivery_id):
        look(chromium, size=size)
        for path in ("/", "/deliveries", f"/deliveries/{delivery_id}", f"/endpoints/{endpoint_id}",
                     "/endpoints", "/endpoints/new", f"/endpoints/{endpoint_id}/edit"):  # fmt: skip
            chromium.get(url + path)
            chromium.execute_script(
                "document.querySelectorAll('.rqw details').forEach((element) => element.open = true)"
            )
            background = chromium.execute_script(
                "return getComputedStyle(document.querySelector('.rqw')).backgroundColor"
            )
            assert background not in ("", "rgba(0, 0, 0, 0)"), (path, "our style is not there")
            # What is outside of our element is the host's.
            found = axe_violations(chromium, axe, within=".rqw")
            assert found == [], (path, found)
            assert sideways(chromium) <= 0, (path, "the page scrolls sideways")


def rows(chromium: Any) -> int:
    return len(chromium.find_elements(By.CSS_SELECTOR, "#rqw-deliveries tbody tr"))


def test_filters_apply_at_once(chromium: Any, sqlite_url: str, redis_url: str) -> None:
    with host_with(LAYOUTS["sidebar"], sqlite_url, redis_url) as (url, _endpoint_id, _delivery_id):
        look(chromium)
        chromium.get(f"{url}/deliveries")
        assert rows(chromium) == 6
        chromium.execute_script("window.same = true")
        chromium.find_element(By.CSS_SELECTOR, "summary").click()
        field = chromium.find_element(By.NAME, "job_id")
        field.send_keys("the-one\t")  # leaves the field
        wait_until(lambda: rows(chromium) == 1, what="the filter was applied")
        assert chromium.current_url.endswith("/deliveries?job_id=the-one")
        hidden = chromium.find_elements(By.CSS_SELECTOR, "#rqw-many input[name=job_id]")
        assert {element.get_attribute("value") for element in hidden} == {"the-one"}
        chromium.find_element(By.CSS_SELECTOR, "input[name=status][value=succeeded]").click()
        wait_until(lambda: "No deliveries match the filter" in chromium.page_source)
        assert "status=succeeded" in chromium.current_url
        # The page was not loaded again: what the reader did stays.
        assert chromium.execute_script("return window.same") is True
        assert field.get_attribute("value") == "the-one"


def test_times_show_local_time_on_hover(chromium: Any, sqlite_url: str, redis_url: str) -> None:
    with host_with(LAYOUTS["sidebar"], sqlite_url, redis_url) as (url, _endpoint_id, delivery_id):
        look(chromium)
        chromium.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
        try:
            chromium.get(f"{url}/deliveries/{delivery_id}")
            titles = chromium.execute_script(
                "const time = document.querySelector('#rqw-delivery time');"
                "const before = time.title;"
                "time.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"
                "const during = time.title;"
                "time.dispatchEvent(new PointerEvent('pointerout', {bubbles: true}));"
                "return [before, during, time.title, time.textContent];"
            )
        finally:
            chromium.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})
    before, during, after, shown = titles
    assert before == after
    assert "your time" in during
    assert "GMT+9" in during or "JST" in during
    assert during.endswith(f"{shown} UTC") or " UTC" in during.splitlines()[-1]
