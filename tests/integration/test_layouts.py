"""Pages inside a layout of the host's: nothing of it is hidden, and what is wrong with it costs no page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Flask, g, render_template, render_template_string, template_rendered
from flask_wtf import CSRFProtect
from jinja2 import DictLoader, StrictUndefined

from flask_rq_webhooks.state import State
from tests.dashboard_app import add_endpoint, add_hostile, open_host
from tests.foreign_layouts import ADMIN, LAYOUTS, host_names
from tests.integration.test_dashboard import MANAGED_PAGES, PAGES, filled

MAY = {"status", "read", "manage"}
OpenLayout = Callable[..., Any]


@pytest.fixture
def in_layout(sqlite_url: str, redis_url: str) -> OpenLayout:
    """Give a function that opens a host whose pages appear in a layout."""

    @contextmanager
    def opened(layout: str, **config: Any) -> Iterator[tuple[Flask, State]]:
        with open_host(sqlite_url, redis_url, MAY, RQ_WEBHOOKS_BASE_TEMPLATE="layout.html", **config) as (
            app,
            state,
        ):
            app.jinja_loader = DictLoader(
                {"layout.html": layout, "plain.html": "{% extends 'layout.html' %}"}
            )
            app.context_processor(host_names)
            yield app, state

    return opened


def test_the_layout_keeps_its_names_and_blocks(in_layout: OpenLayout) -> None:
    with in_layout(ADMIN) as (app, state):
        CSRFProtect(app)
        app.add_url_rule("/logout", "logout", lambda: "bye", methods=["POST"])
        app.add_url_rule("/plain", "plain", lambda: render_template("plain.html"))
        ids = add_hostile(state)
        for path in (*(f"/webhooks{filled(path, ids)}" for path in (*PAGES, *MANAGED_PAGES)), "/plain"):
            client = app.test_client()
            html = client.get(path).text
            assert "own q|own filter|own text|own section" in html, path
            assert "<header>" in html, path
            assert re.search(r"<footer>left own title</footer>", html), path
            (token,) = re.findall(r'id="logout".*?name="csrf_token" value="([^"]*)"', html, re.S)
            assert client.post("/logout", data={"csrf_token": token}).text == "bye", path


def test_every_name_that_is_added_begins_with_rqw(in_layout: OpenLayout) -> None:
    seen: dict[str, Any] = {}

    def note(_sender: Any, context: dict[str, Any], **_more: Any) -> None:
        seen.update(context)

    with in_layout(ADMIN) as (app, state), template_rendered.connected_to(note, app):
        ids = add_hostile(state)
        app.jinja_env.globals["csrf_token"] = lambda: "host"
        with app.test_request_context("/"):
            render_template_string("")
            theirs = set(seen)
        for path in (*PAGES, *MANAGED_PAGES):
            app.test_client().get(f"/webhooks{filled(path, ids)}")
    assert {name for name in seen.keys() - theirs if not name.startswith("rqw_")} == set()
    assert "rqw_delivery" in seen


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("path", ["/", "/deliveries", "/endpoints/new"])
def test_style_and_script_are_there_once_in_any_layout(in_layout: OpenLayout, layout: str, path: str) -> None:
    with in_layout(LAYOUTS[layout]) as (app, _state):
        app.jinja_env.globals["csrf_token"] = lambda: "host"
        html = app.test_client().get(f"/webhooks{path}").text
    section = path.split("/")[1] or ""
    assert f'href="/webhooks/{section}" aria-current="page"' in html
    assert html.count("dashboard.css") == html.count("dashboard.js") == html.count('<div class="rqw">') == 1
    assert "&lt;div" not in html
    assert "Webhooks</title>" in html


@pytest.mark.parametrize(
    "layout",
    [
        "{% block title %}{% endblock %}{% block head %}{% endblock %}{% block main %}{% endblock %}",
        "{% extends 'missing.html' %}",
        "{% if %}",
        "{{ url_for('no_such_view') }}{% block content %}{% endblock %}",
        "{{ 1 / 0 }}{% block content %}{% endblock %}",
        "{{ missing.name }}{% block content %}{% endblock %}",
        "{% extends 'layout.html' %}",
    ],
    ids=["no-content", "no-parent", "syntax", "build-error", "error", "undefined", "itself"],
)
def test_a_layout_that_does_not_work_costs_no_page(
    in_layout: OpenLayout, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    with in_layout(layout) as (app, state):
        endpoint_id = add_endpoint(state)
        for path in ("/", f"/endpoints/{endpoint_id}", "/endpoints/new"):
            response = app.test_client().get(f"/webhooks{path}")
            assert response.status_code == 200, path
            assert '<body class="rqw-body">' in response.text
            assert response.text.count("dashboard.css") == 1
    assert "cannot be shown in RQ_WEBHOOKS_BASE_TEMPLATE 'layout.html'" in caplog.text
    assert "doctor" in caplog.text


def _set_jinja(app: Flask, **options: Any) -> None:
    app.jinja_options = {**app.jinja_options, **options}


def _break(app: Flask, *names: str) -> None:
    """Replace filters and globals of the app's by some that raise."""

    def broken(*_values: Any, **_more: Any) -> Any:
        raise RuntimeError("of the host")

    app.jinja_env.filters |= dict.fromkeys(names, broken)
    app.jinja_env.globals |= dict.fromkeys(names, broken)


#: How hosts set Jinja up.
SETTINGS: dict[str, Callable[[Flask], Any]] = {
    "strict": lambda app: _set_jinja(app, undefined=StrictUndefined),
    "Vue": lambda app: _set_jinja(app, variable_start_string="[[", variable_end_string="]]"),
    "other blocks": lambda app: _set_jinja(app, block_start_string="<%", block_end_string="%>"),
    "line statements": lambda app: _set_jinja(app, line_statement_prefix="#", line_comment_prefix="//"),
    "async": lambda app: _set_jinja(app, enable_async=True),
    "finalize": lambda app: _set_jinja(app, finalize=lambda value: "" if value is None else value),
    "no escaping": lambda app: setattr(app, "select_jinja_autoescape", lambda name: False),
    "own filters": lambda app: _break(app, "length", "join", "format", "list", "range", "url_for"),
    "own names": lambda app: app.context_processor(lambda: {"url_for": None, "request": None, "rqw_now": 1}),
}


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("base", [None, "layout.html"])
def test_how_the_host_sets_jinja_up_changes_no_page(
    sqlite_url: str, redis_url: str, name: str, base: str | None
) -> None:
    app = Flask("host")
    SETTINGS[name](app)
    layout = "<title>{% block title %}{% endblock %}</title>{% block head %}<meta name=mine>{% endblock %}" \
        "<body>LAYOUT{% block content %}{% endblock %}"  # fmt: skip
    for theirs, ours in ((app.jinja_env.block_start_string, "{%"), (app.jinja_env.block_end_string, "%}")):
        layout = layout.replace(ours, theirs)
    app.jinja_loader = DictLoader({"layout.html": layout})
    with open_host(sqlite_url, redis_url, MAY, app=app, RQ_WEBHOOKS_BASE_TEMPLATE=base) as (_app, state):
        ids = add_hostile(state)
        for path in (*PAGES, *MANAGED_PAGES):
            response = app.test_client().get(f"/webhooks{filled(path, ids)}")
            html = response.text
            assert response.status_code == 200, path
            assert ("LAYOUT" in html) is ("<meta name=mine>" in html) is (base is not None), path
            assert html.count("dashboard.css") == html.count("dashboard.js") == 1, path
            assert " · Webhooks</title>" in html, path
            assert not re.search(r"rqw_|super\(|<%|%}|<!--rqw|<script>|<img", html), path


def test_a_context_processor_that_raises_costs_no_page(
    in_layout: OpenLayout, caplog: pytest.LogCaptureFixture
) -> None:
    with in_layout(ADMIN) as (app, _state):
        app.context_processor(lambda: {"user": g.user.name})
        assert app.test_client().get("/webhooks/").status_code == 200
    assert "AttributeError" in caplog.text


def test_a_layout_that_is_not_there_costs_no_page(
    sqlite_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_host(sqlite_url, redis_url, MAY, RQ_WEBHOOKS_BASE_TEMPLATE="typo.html") as (app, _state):
        assert app.test_client().get("/webhooks/").status_code == 200
    assert "typo.html" in caplog.text


@pytest.mark.parametrize("base", [None, "layout.html"])
def test_a_loader_that_knows_no_blueprints_costs_no_page(
    sqlite_url: str, redis_url: str, base: str | None
) -> None:
    with open_host(sqlite_url, redis_url, MAY, RQ_WEBHOOKS_BASE_TEMPLATE=base) as (app, _state):
        app.jinja_env.loader = DictLoader({"layout.html": LAYOUTS["sidebar"]})
        html = app.test_client().get("/webhooks/deliveries").text
    assert "<h1>Deliveries</h1>" in html
    assert ("<aside>" in html) is (base is not None)


def test_every_route_answers_where_routes_are_chosen_by_host(sqlite_url: str, redis_url: str) -> None:
    def made() -> Flask:
        app = Flask("host", host_matching=True, static_host="static.example.com")
        app.add_url_rule("/own", "own", lambda: "own", host="www.example.com")
        return app

    with open_host(sqlite_url, redis_url, MAY, app=made()) as (app, state):
        ids = add_hostile(state)
        client = app.test_client()
        for host in ("www.example.com", "localhost:5000"):
            for path in (*PAGES, *MANAGED_PAGES, "/health", "/api/deliveries", "/assets/dashboard.css"):
                response = client.get(f"http://{host}/webhooks{filled(path, ids)}")
                response.close()
                assert response.status_code == (503 if path == "/health" else 200), (host, path)
            assert 'href="/webhooks/deliveries"' in client.get(f"http://{host}/webhooks/").text
        assert client.get("http://www.example.com/own").text == "own"
