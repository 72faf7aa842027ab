"""Parsers of request bodies beside ``accepts_webhook``, above it and below it, as hosts use them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import apiflask
import flask_openapi3
import flask_pydantic
import flask_smorest
import marshmallow
import pydantic
import pytest
import redis
from apiflask import fields as apiflask_fields
from flask import Flask, request
from flask.views import MethodView
from flask_sqlalchemy import SQLAlchemy
from webargs import fields, flaskparser

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.state import get_state
from tests import jobs

URL = "https://hooks.example.com/in"
SECRET = "a secret of the client"
ASKED = {"webhook_url": URL, "webhook_secret": SECRET, "webhook_headers": {"X-Own": "1"}}

Decorate = Callable[[Callable[..., Any]], Callable[..., Any]]


class Strict(marshmallow.Schema):
    class Meta:
        unknown = marshmallow.RAISE

    a = marshmallow.fields.Int(required=True)


class StrictOfAPIFlask(apiflask.Schema):
    class Meta:
        unknown = marshmallow.RAISE

    a = apiflask_fields.Integer(required=True)


class StrictModel(pydantic.BaseModel, extra="forbid"):
    a: int


class Host:
    """An app whose one route parses its body and enqueues a job with what the parser gave."""

    def __init__(self, redis_url: str, sqlite_url: str) -> None:
        self.connection = redis.Redis.from_url(redis_url)
        self.config = {
            "SECRET_KEY": "tests", "SQLALCHEMY_DATABASE_URI": sqlite_url, "RQ_WEBHOOKS_REDIS_URL": redis_url,
            "API_TITLE": "t", "API_VERSION": "1", "OPENAPI_VERSION": "3.0.3",
        }  # fmt: skip
        self.app: Flask

    def use(self, app: Flask) -> Decorate:
        app.config.update(self.config)
        self.app = app
        webhooks = RQWebhooks(app, db=SQLAlchemy(app))
        get_state(app).database.create_tables()
        return webhooks.accepts_webhook

    def enqueue(self, value: int) -> dict[str, Any]:
        job = Queue("default", connection=self.connection).enqueue(jobs.add, value, 1)
        return {"job_id": job.id, "value": value}

    def close(self) -> None:
        state = get_state(self.app)
        state.database.dispose()
        state.redis.close()
        with self.app.app_context():
            self.app.extensions["sqlalchemy"].engine.dispose()
        self.connection.close()


@pytest.fixture
def host(redis_url: str, sqlite_url: str) -> Iterator[Host]:
    made = Host(redis_url, sqlite_url)
    yield made
    made.close()


def in_order(view: Callable[..., Any], accepts: Decorate, parse: Decorate, above: bool) -> Callable[..., Any]:
    return accepts(parse(view)) if above else parse(accepts(view))


def with_webargs(host: Host, above: bool, location: str = "json") -> None:
    accepts = host.use(Flask("webargs"))

    def view(a: int) -> Any:
        return host.enqueue(a)

    parse = flaskparser.use_kwargs(
        {"a": fields.Int(required=True)}, location=location, unknown=marshmallow.RAISE
    )
    host.app.post("/go")(in_order(view, accepts, parse, above))


def with_smorest(host: Host, above: bool) -> None:
    accepts = host.use(Flask("smorest"))
    blueprint = flask_smorest.Blueprint("b", "b")

    def view(args: dict[str, int]) -> Any:
        return host.enqueue(args["a"])

    blueprint.route("/go", methods=["POST"])(in_order(view, accepts, blueprint.arguments(Strict), above))
    flask_smorest.Api(host.app).register_blueprint(blueprint)


def with_smorest_method_view(host: Host, above: bool) -> None:
    accepts = host.use(Flask("smorest"))
    blueprint = flask_smorest.Blueprint("b", "b")

    def post(self: MethodView, args: dict[str, int]) -> Any:
        return host.enqueue(args["a"])

    view = type("Go", (MethodView,), {"post": in_order(post, accepts, blueprint.arguments(Strict), above)})
    blueprint.route("/go")(view)
    flask_smorest.Api(host.app).register_blueprint(blueprint)


def with_apiflask(host: Host, above: bool) -> None:
    app = apiflask.APIFlask("apiflask")
    accepts = host.use(app)

    def view(json_data: dict[str, int]) -> Any:
        return host.enqueue(json_data["a"])

    app.post("/go")(in_order(view, accepts, app.input(StrictOfAPIFlask), above))


def with_pydantic(host: Host, above: bool) -> None:
    accepts = host.use(Flask("pydantic"))

    def view(body: Any) -> Any:
        return host.enqueue(body.a)

    view.__annotations__["body"] = StrictModel
    host.app.post("/go")(in_order(view, accepts, flask_pydantic.validate(), above))


def with_openapi3(host: Host, above: bool) -> None:
    """Its parser is in the route itself, so always above; and the annotation has to be a real class."""
    app = flask_openapi3.OpenAPI("openapi3", info=flask_openapi3.Info(title="t", version="1"))
    accepts = host.use(app)

    def view(body: Any) -> Any:
        return host.enqueue(body.a)

    view.__annotations__["body"] = StrictModel
    app.post("/go")(accepts(view))


def with_json_loads(host: Host, above: bool) -> None:
    """A parser of the host's own, which cannot be known: it has to be below."""
    accepts = host.use(Flask("own"))

    def parse(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def wrapper() -> Any:
            sent = json.loads(request.data)
            if set(sent) != {"a"} or request.content_length != len(request.data):
                return {"unknown": sorted(sent)}, 422
            return view(int(sent["a"]))

        return wrapper

    host.app.post("/go")(accepts(parse(host.enqueue)))


PARSERS = {
    "webargs": with_webargs,
    "flask-smorest": with_smorest,
    "flask-smorest, MethodView": with_smorest_method_view,
    "APIFlask": with_apiflask,
    "Flask-Pydantic": with_pydantic,
    "flask-openapi3": with_openapi3,
    "json.loads": with_json_loads,
}


@pytest.mark.parametrize("above", [True, False], ids=["decorator above", "decorator below"])
@pytest.mark.parametrize("make", PARSERS.values(), ids=PARSERS.keys())
def test_json(host: Host, make: Callable[[Host, bool], None], above: bool) -> None:
    make(host, above)
    client = host.app.test_client()

    plain = client.post("/go", json={"a": 7})
    asked = client.post("/go", json={"a": 8, **ASKED})
    by_headers = client.post(
        "/go", json={"a": 9}, headers={"X-Webhook-Url": URL, "X-Webhook-Secret": "s" * 20}
    )
    unknown = client.post("/go", json={"a": 1, "b": 2, **ASKED})
    unknown_plain = client.post("/go", json={"a": 1, "b": 2})
    bad_fields = client.post("/go", json={"a": 1, "webhook_url": "ftp://x"})

    assert [answer.status_code for answer in (plain, asked, by_headers)] == [200, 200, 200], asked.text
    assert [answer.get_json()["value"] for answer in (plain, asked, by_headers)] == [7, 8, 9]
    assert "Webhook-Registered" not in plain.headers
    assert asked.headers["Webhook-Registered"] == by_headers.headers["Webhook-Registered"] == "true"
    assert asked.headers["Webhook-Job-Id"] == asked.get_json()["job_id"]
    assert unknown.status_code == unknown_plain.status_code != 200
    assert "webhook" not in unknown.text
    assert bad_fields.status_code == 400
    assert bad_fields.get_json()["error"]["code"] == "invalid_webhook"
    assert b"webhook_secret" not in b"".join(
        host.connection.hget(key, "description") for key in host.connection.scan_iter("rq:job:*")
    )


@pytest.mark.parametrize("above", [True, False], ids=["decorator above", "decorator below"])
@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "multipart/form-data"])
def test_webargs_forms(host: Host, content_type: str, above: bool) -> None:
    with_webargs(host, above, location="form")
    client = host.app.test_client()
    sent = {"a": "8", "webhook_url": URL, "webhook_secret": SECRET}

    answer = client.post("/go", data=sent, content_type=content_type)
    plain = client.post("/go", data={"a": "7"}, content_type=content_type)

    assert (answer.status_code, plain.status_code) == (200, 200), answer.text
    assert answer.headers["Webhook-Registered"] == "true"


def test_decorator_that_checks_the_raw_bytes_above_ours_finds_them(host: Host) -> None:
    """Signature checks come before us, and are made of the bytes the client sent."""
    accepts = host.use(Flask("signed"))
    seen: list[bytes] = []

    def check(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def wrapper() -> Any:
            seen.append(request.get_data())
            return view()

        return wrapper

    def view() -> Any:
        seen.append(request.get_data())
        return host.enqueue(request.get_json()["a"])

    host.app.post("/go")(check(accepts(view)))
    sent = json.dumps({"a": 1, **ASKED}).encode()
    answer = host.app.test_client().post("/go", data=sent, content_type="application/json")

    assert answer.headers["Webhook-Registered"] == "true"
    assert seen == [sent, b'{"a": 1}']


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/octet-stream", "application/vnd.api+json"]
)
def test_json_under_another_content_type(host: Host, content_type: str) -> None:
    accepts = host.use(Flask("forced"))

    def view() -> Any:
        return host.enqueue(request.get_json(force=True)["a"]) | {"keys": list(json.loads(request.data))}

    host.app.post("/go")(accepts(view))
    answer = host.app.test_client().post("/go", data=json.dumps({"a": 3, **ASKED}), content_type=content_type)

    assert answer.headers["Webhook-Registered"] == "true"
    assert answer.get_json()["keys"] == ["a"]


def test_hide_parsed_and_headers_only(host: Host) -> None:
    host.use(Flask("options"))
    webhooks: RQWebhooks = host.app.extensions["rq_webhooks"].hooks

    def view() -> Any:
        return host.enqueue(1) | {"raw": request.get_data(as_text=True), "parsed": request.get_json()}

    host.app.add_url_rule("/parsed", "p", webhooks.accepts_webhook(hide="parsed")(view), methods=["POST"])
    host.app.add_url_rule("/headers", "h", webhooks.accepts_webhook(fields="headers")(view), methods=["POST"])
    client = host.app.test_client()
    sent = {"a": 1, "webhook_url": URL}

    parsed, in_body = client.post("/parsed", json=sent), client.post("/headers", json=sent)
    in_headers = client.post("/headers", json={"a": 1}, headers={"X-Webhook-Url": URL})

    assert json.loads(parsed.get_json()["raw"]) == sent
    assert parsed.get_json()["parsed"] == {"a": 1}
    assert parsed.headers["Webhook-Registered"] == "true"
    assert "Webhook-Registered" not in in_body.headers
    assert in_body.get_json()["parsed"] == sent
    assert in_headers.headers["Webhook-Registered"] == "true"
