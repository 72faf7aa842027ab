"""Webhook fields are found wherever they may be, and hidden no further than promised."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from flask import Flask, Response, jsonify, request
from flask.testing import FlaskClient
from werkzeug.datastructures import ImmutableDict, MultiDict

from flask_rq_webhooks.accept import request_fields
from flask_rq_webhooks.accept.request_fields import take_fields
from flask_rq_webhooks.errors import InvalidWebhookError

URL = "https://hooks.example.com/in"
#: Before 3.1, Werkzeug takes an escaped name as it stands, for us and for the view alike.
UNESCAPES_NAMES = not version("werkzeug").startswith("3.0.")
SECRET = "  a secret with spaces  "


class Host:
    """An app with one route that takes the fields and then does what a test wants of a view."""

    def __init__(self, view: Callable[[], Any], **options: Any) -> None:
        self.app = Flask("host")
        self.taken: Any = "never asked"

        @self.app.route("/", methods=["GET", "POST", "PUT"])
        def route() -> Any:
            try:
                self.taken = take_fields(request._get_current_object(), **options)
            except InvalidWebhookError as exc:
                self.taken = exc.details
                return jsonify(exc.details), 400
            return view()

    @property
    def client(self) -> FlaskClient:
        return self.app.test_client()


def form_as_json(form: MultiDict[str, Any]) -> Any:
    return [[name, value] for name, value in form.items(multi=True)]


def see_json() -> Any:
    return jsonify(request.get_json())


def see_form() -> Any:
    return jsonify(form_as_json(request.form))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            json.dumps({"a": 1, "webhook_url": URL, "webhook_secret": SECRET, "b": [2]}), id="plain"
        ),
        pytest.param(
            '{"a": 1, "\\u0077ebhook_url": "'
            + URL
            + '", "webhook\\u005fsecret": "'
            + SECRET
            + '", "b": [2]}',
            id="escaped names",
        ),
        pytest.param(
            json.dumps({"a": 1, "webhook_url": URL, "webhook_secret": SECRET, "b": [2]}).encode("utf-16"),
            id="utf-16",
        ),
        pytest.param(
            json.dumps({"a": 1, "webhook_url": URL, "webhook_secret": SECRET, "b": [2]}).encode("utf-32-le"),
            id="utf-32 without a mark",
        ),
        pytest.param(
            "  \n"
            + json.dumps(
                {"a": 1, "webhook_url": URL, "webhook_secret": SECRET, "b": [2], "sign_payload": True}
            ),
            id="leading space",
        ),
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "application/vnd.api+json; charset=utf-8"])
@pytest.mark.parametrize("hide", ["all", "parsed"])
def test_json_object(body: str | bytes, content_type: str, hide: str) -> None:
    seen: list[Any] = []

    def view() -> Any:
        for options in (
            {},
            {"silent": True},
            {"force": True},
            {"cache": False},
            {"force": True, "silent": True},
        ):
            seen.append(request.get_json(**options))
        seen.append(request.json)
        assert request.get_json() is request.get_json()
        assert request.content_length == len(request.get_data()) == int(request.headers["Content-Length"])
        return Response(request.get_data())

    host = Host(view, hide=hide)
    response = host.client.post("/", data=body, content_type=content_type)

    assert host.taken["webhook_url"] == URL
    assert host.taken["webhook_secret"] == SECRET
    assert seen[0] == {"a": 1, "b": [2]}
    assert list(seen[0]) == ["a", "b"]
    assert all(value == seen[0] for value in seen)
    if hide == "parsed":
        assert response.data == (body.encode() if isinstance(body, str) else body)
    else:
        assert json.loads(response.data) == {"a": 1, "b": [2]}
        assert SECRET not in response.data.decode(json.detect_encoding(response.data))


def test_every_field_is_hidden_and_nothing_else() -> None:
    host = Host(see_json)
    sent = {name: "x" for name in request_fields.FIELDS} | {
        "webhook_other": 1, "nested": {"webhook_url": 2}, "sign": 3, "null": None,
    }  # fmt: skip

    response = host.client.post("/", json=sent)

    assert response.get_json() == {"webhook_other": 1, "nested": {"webhook_url": 2}, "sign": 3, "null": None}
    assert set(host.taken) == request_fields.FIELDS


@pytest.mark.parametrize(
    ("sent", "content_type"),
    [
        ({"sign_payload": True, "webhook_secret": "s", "a": 1}, "application/json"),
        ({"webhook_url": None, "webhook_secret": None, "a": 1}, "application/json"),
        ([{"webhook_url": URL}], "application/json"),
        ("webhook_url", "application/json"),
        ({"text": "webhook_url"}, "text/plain"),
    ],
)
def test_without_a_url_nothing_is_taken_or_hidden(sent: Any, content_type: str) -> None:
    host = Host(lambda: jsonify(request.get_json(force=True)))

    response = host.client.post("/", data=json.dumps(sent), content_type=content_type)

    assert host.taken is None
    assert response.get_json() == sent


def test_null_is_as_if_absent_beside_a_url() -> None:
    host = Host(see_json)

    host.client.post("/", json={"webhook_url": URL, "webhook_secret": None, "webhook_events": None})

    assert host.taken == {"webhook_url": URL}


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/octet-stream", "", None, request_fields.FORM]
)
def test_json_object_under_another_content_type(content_type: str | None) -> None:
    seen: list[Any] = []

    def view() -> Any:
        seen.append(request.get_json(silent=True))
        return jsonify(request.get_json(force=True))

    host = Host(view)
    response = host.client.post("/", data=json.dumps({"webhook_url": URL, "a": 1}), content_type=content_type)

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == {"a": 1}
    assert seen == [None]  # the content type means what it meant


@pytest.mark.parametrize(
    "body",
    [
        b'{"webhook_url": ',
        b"{" * 100_000 + b"webhook_url",
        b'{"webhook_url": "\xff"}',
        b"\xff\xfewebhook_url",
    ],
    ids=["cut", "deep", "not utf-8", "not json"],
)
def test_bad_json_is_left_to_the_view(body: bytes) -> None:
    host = Host(lambda: Response(request.get_data()))

    response = host.client.post("/", data=body, content_type="application/json")

    assert host.taken is None
    assert response.data == body


def test_json_that_was_parsed_before_the_view() -> None:
    host = Host(see_json)
    before: list[Any] = []
    host.app.before_request(lambda: before.append(request.get_json()))

    response = host.client.post("/", json={"webhook_url": URL, "a": 1})

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == {"a": 1}
    assert before == [{"webhook_url": URL, "a": 1}]


def test_hosts_own_json_provider_is_used() -> None:
    host = Host(see_json)
    loads = host.app.json.loads
    host.app.json.loads = lambda s, **kwargs: loads(s, parse_float=str, **kwargs)  # type: ignore[method-assign]

    response = host.client.post("/", json={"webhook_url": URL, "a": 1.50})

    assert response.get_json() == {"a": "1.5"}


FORM = MultiDict(
    [("b", "2"), ("a", "1"), ("webhook_url", URL), ("a", "3"), ("webhook_secret", SECRET), ("c", " ")]
)
REST = [["b", "2"], ["a", "1"], ["a", "3"], ["c", " "]]


def encode_urlencoded(extra: bytes = b"") -> tuple[bytes, str]:
    from urllib.parse import urlencode

    return urlencode(list(FORM.items(multi=True))).encode() + extra, request_fields.FORM


def encode_multipart(name_of_url: bytes = b'name="webhook_url"') -> tuple[bytes, str]:
    parts = b""
    for name, value in FORM.items(multi=True):
        said = name_of_url if name == "webhook_url" else b'name="%s"' % name.encode()
        parts += b"--limit\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (said, value.encode())
    parts += b'--limit\r\nContent-Disposition: form-data; name="file"; filename="soil.txt"\r\n'
    parts += b"Content-Type: text/plain\r\n\r\nwebhook_url=not+a+field\r\n--limit--\r\n"
    return parts, "multipart/form-data; boundary=limit"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param(*encode_urlencoded(), id="urlencoded"),
        pytest.param(
            encode_urlencoded()[0].replace(b"webhook_url", b"%77ebhook%5Furl"),
            request_fields.FORM,
            id="encoded names",
        ),
        pytest.param(*encode_multipart(), id="multipart"),
        pytest.param(*encode_multipart(b"name*=utf-8''%77ebhook_url"), id="multipart, RFC 2231"),
        pytest.param(
            *encode_multipart(rb'name="webhook\_url"' if UNESCAPES_NAMES else b'name="webhook_url"'),
            id="multipart, escaped name",
        ),
        pytest.param(*encode_multipart(b"NAME*0=web; name*1=hook_url"), id="multipart, continued name"),
    ],
)
def test_form(body: bytes, content_type: str) -> None:
    seen: dict[str, Any] = {}

    def view() -> Any:
        seen["values"] = request.values.get("webhook_url")
        seen["form"] = form_as_json(request.form)
        seen["file"] = request.files["file"].read() if request.files else None
        seen["again"] = form_as_json(request.form)
        return {}

    host = Host(view)
    host.client.post("/", data=body, content_type=content_type)

    assert host.taken == {"webhook_url": URL, "webhook_secret": SECRET}
    assert seen["form"] == REST
    assert seen["again"] == REST
    assert seen["values"] is None
    assert seen["file"] in (None, b"webhook_url=not+a+field")


@pytest.mark.parametrize(
    ("body", "content_type"), [encode_urlencoded(), encode_multipart()], ids=["url", "multi"]
)
def test_form_bytes_are_left_alone_where_only_parsed_values_are_hidden(
    body: bytes, content_type: str
) -> None:
    seen: list[Any] = []

    def view() -> Any:
        seen.append(request.get_data())
        seen.append(form_as_json(request.form))
        return {}

    Host(view, hide="parsed").client.post("/", data=body, content_type=content_type)

    assert seen == [body, REST]


def test_urlencoded_form_is_written_again_and_the_rest_stays_as_it_was_written() -> None:
    seen: list[Any] = []

    def view() -> Any:
        seen.append((request.content_length, request.stream.read(), request.headers["Content-Length"]))
        return {}

    body = b"b=2&a=%31&webhook%5furl=https%3A%2F%2Fhooks.example.com%2Fin&c=+&d&&webhook_secret=s&a=3"
    host = Host(view)
    host.client.post("/", data=body, content_type=request_fields.FORM)

    assert host.taken == {"webhook_url": URL, "webhook_secret": "s"}
    assert seen == [(20, b"b=2&a=%31&c=+&d&&a=3", "20")]


@pytest.mark.parametrize("hide", ["all", "parsed"])
def test_body_read_before_the_view_is_hidden_all_the_same(hide: str) -> None:
    host = Host(lambda: jsonify(request.get_json(), request.form, len(request.get_data())), hide=hide)
    host.app.before_request(lambda: print(request.get_data(), request.json))
    sent = {"webhook_url": URL, "a": 1}

    response = host.client.post("/", json=sent)

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == [{"a": 1}, {}, 8 if hide == "all" else len(json.dumps(sent))]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"webhook_url": "u"}', "{}"),
        ('{"a":1.50,"webhook_url":"u","b":12345678901234567890.1,"c":NaN}',
         '{"a":1.50, "b":12345678901234567890.1, "c":NaN}'),
        (' {"webhook_url" : "u" , "a" : {"webhook_url": [1, 2]} } ', '{"a" : {"webhook_url": [1, 2]}}'),
        ('{"a": "}", "webhook_url": "\\"}{", "b": [{"x": ","}]}', '{"a": "}", "b": [{"x": ","}]}'),
    ],
    ids=["only", "numbers", "spaces", "quotes"],
)  # fmt: skip
def test_json_is_cut_and_what_is_left_stays_as_it_was_written(text: str, rest: str) -> None:
    host = Host(lambda: Response(request.get_data()))

    response = host.client.post("/", data=text, content_type="application/json")

    assert host.taken is not None
    assert response.text == rest


@pytest.mark.parametrize(
    "text",
    ['{"webhook_url": "u",}', '{"webhook_url": "u"} x', '{"webhook_url" "u"}', '{"webhook_url": "u"',
     '{"webhook_url": "u" "a": 1}', '{1: "webhook_url"}', '["webhook_url"]', "webhook_url"],
)  # fmt: skip
def test_what_is_no_json_object_is_left_to_the_view(text: str) -> None:
    host = Host(lambda: Response(request.get_data()))

    response = host.client.post("/", data=text, content_type="application/json")

    assert host.taken is None
    assert response.text == text


def test_headers_only_leave_the_body_untouched() -> None:
    class Untouchable(io.BytesIO):
        def read(self, *args: Any) -> bytes:
            raise AssertionError("the body was read")

    host = Host(lambda: {"args": dict(request.args)}, body=False)
    response = host.client.post(
        "/?webhook_url=" + URL,
        input_stream=Untouchable(),
        content_type="application/json",
        headers={"X-Webhook-Secret": "s"},
        environ_overrides={"CONTENT_LENGTH": "500"},
    )

    assert host.taken == {"webhook_url": URL, "webhook_secret": "s"}
    assert response.get_json() == {"args": {}}


def test_same_json_field_twice_is_refused() -> None:
    host = Host(lambda: {})
    host.client.post("/", data='{"webhook_url": "u", "webhook_url": "v"}', content_type="application/json")
    assert host.taken == {"webhook_url": ["Given more than once."]}


@pytest.mark.parametrize(
    ("body", "content_type"), [encode_urlencoded(), encode_multipart()], ids=["url", "multi"]
)
def test_form_that_was_parsed_before_the_view(body: bytes, content_type: str) -> None:
    host = Host(
        lambda: jsonify(
            form=form_as_json(request.form), files=sorted(request.files), values=list(request.values)
        )
    )
    host.app.before_request(lambda: print(request.values.get("csrf_token")))

    response = host.client.post("/?q=1", data=body, content_type=content_type)

    assert host.taken == {"webhook_url": URL, "webhook_secret": SECRET}
    assert response.get_json()["form"] == REST
    assert sorted(response.get_json()["values"]) == ["a", "b", "c", "q"]


def test_form_read_by_a_csrf_check_does_not_hide_a_json_body() -> None:
    host = Host(see_json)
    host.app.before_request(lambda: print(request.form.get("csrf_token")))

    response = host.client.post("/", json={"webhook_url": URL, "a": 1})

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == {"a": 1}


def test_storage_class_of_one_value_per_name() -> None:
    host = Host(lambda: dict(request.form))
    host.app.request_class = type(
        "Request", (Flask.request_class,), {"parameter_storage_class": ImmutableDict}
    )

    response = host.client.post("/", data={"webhook_url": URL, "a": "1"})

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == {"a": "1"}


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"data": {"webhook_url": [URL, URL]}}, "webhook_url"),
        ({"data": {"webhook_url": URL, "webhook_secret": ["a", "b"]}}, "webhook_secret"),
        ({"data": {"webhook_url": URL}, "query_string": {"webhook_url": URL}}, "webhook_url"),
        ({"json": {"webhook_url": URL}, "headers": {"X-Webhook-Url": URL}}, "webhook_url"),
        ({"query_string": {"webhook_url": URL, "webhook_secret": "s"}}, "webhook_secret"),
        ({"json": {"webhook_url": URL}, "query_string": {"webhook_headers": "{}"}}, "webhook_headers"),
        ({"query_string": {"webhook_url": URL, "sign_payload": "1"}}, "sign_payload"),
        ({"json": [1], "headers": {"X-Webhook-Url": URL, "X-Webhook-Secret": b"\xff\xfe".decode("latin-1")}},
         "webhook_secret"),
    ],
    ids=["url twice", "secret twice", "form and query", "json and header", "secret in query",
         "headers in query", "sign in query", "not utf-8"],
)  # fmt: skip
def test_refused(options: dict[str, Any], refused: str) -> None:
    host = Host(lambda: {})

    response = host.client.post("/", **options)

    assert response.status_code == 400
    assert list(host.taken) == [refused]


def test_list_body_with_headers() -> None:
    host = Host(see_json)
    secret = "schlüssel"

    response = host.client.post(
        "/",
        json=[1, {"webhook_url": "not a field"}],
        headers={
            "X-Webhook-Url": URL,
            "X-Webhook-Secret": secret.encode().decode("latin-1"),
            "X-Webhook-Headers": '{"A": "b"}',
        },
    )

    assert host.taken == {"webhook_url": URL, "webhook_secret": secret, "webhook_headers": '{"A": "b"}'}
    assert response.get_json() == [1, {"webhook_url": "not a field"}]


def test_url_in_the_query_string_and_secret_in_the_body() -> None:
    host = Host(lambda: jsonify(args=form_as_json(request.args), form=form_as_json(request.form)))

    response = host.client.post(
        "/", query_string={"q": "1", "webhook_url": URL}, data={"webhook_secret": "s", "a": "1"}
    )

    assert host.taken == {"webhook_url": URL, "webhook_secret": "s"}
    assert response.get_json() == {"args": [["q", "1"]], "form": [["a", "1"]]}


def test_percent_encoded_name_in_the_query_string_of_a_get() -> None:
    host = Host(lambda: jsonify(form_as_json(request.values)))

    response = host.client.get("/?%77ebhook_url=" + URL + "&q=1")

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == [["q", "1"]]


# As if undecorated


def read_stream() -> Any:
    return Response(request.stream.read())


def read_input() -> Any:
    return Response(request.environ["wsgi.input"].read())


def read_in_pieces() -> Any:
    pieces = []
    size = 7 if (request.content_length or 0) < 10_000 else 70_001
    while piece := request.stream.read(size):
        assert len(piece) <= size
        pieces.append(piece)
    return Response(b"".join(pieces))


def read_lines() -> Any:
    return Response(b"".join(request.stream.readlines()))


def read_data_then_stream() -> Any:
    return jsonify(len(request.get_data()), len(request.stream.read()))


def read_form_then_data() -> Any:
    return jsonify(form_as_json(request.form), len(request.get_data()), len(request.data))


def read_data_property() -> Any:
    return jsonify(len(request.data), form_as_json(request.form), sorted(request.files))


def read_json() -> Any:
    return jsonify(request.get_json(silent=True), request.get_json(silent=True, force=True), request.is_json)


BIG = b"x" * (request_fields.IN_MEMORY + 5)
BODIES = {
    "json": (b'{"a": [1, 2, 3]}', "application/json"),
    "json with the word": (b'{"a": "webhook_url"}', "application/json"),
    "large json": (b'{"a": "' + BIG + b'"}', "application/json"),
    "urlencoded": (b"a=1&b=2&a=%3D", request_fields.FORM),
    "multipart": (
        encode_multipart()[0].replace(b"webhook_url", b"other_field"),
        "multipart/form-data; boundary=limit",
    ),
    "multipart with the word": (
        encode_multipart(b'name="other"')[0],
        "multipart/form-data; boundary=limit",
    ),
    "gzip": (gzip.compress(BIG), "application/octet-stream"),
    "large text": (BIG, "text/plain"),
    "large text like an object": (b"{" + BIG, "text/plain"),
    "empty": (b"", "application/json"),
}


@pytest.mark.parametrize("name", list(BODIES))
@pytest.mark.parametrize(
    "view",
    [read_stream, read_input, read_in_pieces, read_lines, read_data_then_stream, read_form_then_data,
     read_data_property, read_json],
    ids=lambda view: view.__name__,
)  # fmt: skip
def test_request_without_fields_is_as_if_nobody_had_looked(
    view: Callable[[], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, content_type = BODIES[name]
    if view is read_lines and len(body) > request_fields.IN_MEMORY:
        # Werkzeug reads lines byte by byte: a large body need not be that large.
        monkeypatch.setattr(request_fields, "IN_MEMORY", 2**14)
        body = body.replace(BIG, (b"x" * 99 + b"\n") * (2**14 // 100 + 1))
    plain, looked_at = Flask("plain"), Host(view)
    plain.add_url_rule("/", view_func=view, methods=["POST"])
    for limit, terminated in itertools.product((None, 50 * 2**20), (False, True)):
        answers = []
        for app in (plain, looked_at.app):
            app.config["MAX_CONTENT_LENGTH"] = limit
            environ = {"wsgi.input_terminated": True} if terminated else {}
            with app.test_client() as client:
                answers.append(
                    client.post("/", data=body, content_type=content_type, environ_overrides=environ).data
                )
        assert looked_at.taken is None
        assert answers[0] == answers[1], (limit, terminated)


@pytest.mark.parametrize(
    "content_type", ["application/json", request_fields.FORM, "multipart/form-data; boundary=x"]
)
@pytest.mark.parametrize(
    "view", [read_stream, read_json, read_form_then_data], ids=lambda view: view.__name__
)
@pytest.mark.parametrize("chunked", [True, False])
def test_too_large_a_body_fails_where_it_would_have_failed(
    view: Callable[[], Any], content_type: str, chunked: bool
) -> None:
    statuses = []
    plain, looked_at, blind = Flask("plain"), Host(view), Host(lambda: {})
    plain.add_url_rule("/", view_func=view, methods=["POST"])
    for app in (plain, looked_at.app, blind.app):
        app.config["MAX_CONTENT_LENGTH"] = 10
        environ: dict[str, Any] = {}
        options: dict[str, Any] = {"data": b'{"webhook_url": "%s"}' % URL.encode()}
        if chunked:
            environ = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
            options = {"input_stream": io.BytesIO(options["data"])}
        response = app.test_client().post(
            "/", content_type=content_type, environ_overrides=environ, **options
        )
        statuses.append((response.status_code, response.data if response.status_code == 200 else b""))

    if chunked:
        # Its length is not known before it is read, and a view must not take the part for the whole.
        assert [status for status, _ in statuses[1:]] == [413, 413]
        return
    assert statuses[0] == statuses[1]
    assert statuses[2][0] == 200  # a view that does not look at the body is not disturbed
    assert looked_at.taken is None


def test_chunked_body_without_a_length() -> None:
    host = Host(see_json)

    response = host.client.post(
        "/",
        input_stream=io.BytesIO(json.dumps({"webhook_url": URL, "a": 1}).encode()),
        content_type="application/json",
        environ_overrides={"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
    )

    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == {"a": 1}


def test_large_upload_goes_through_flasks_form_parser_once() -> None:
    def view() -> Any:
        uploaded = request.files["file"]
        return jsonify(uploaded.filename, len(uploaded.read()), form_as_json(request.form))

    host = Host(view)
    body = encode_multipart()[0].replace(b"not+a+field", BIG)
    response = host.client.post("/", data=body, content_type="multipart/form-data; boundary=limit")

    assert response.get_json() == ["soil.txt", len(BIG) + len("webhook_url="), REST]
    assert host.taken == {"webhook_url": URL, "webhook_secret": SECRET}


@pytest.mark.parametrize("before", [0, 1, 49, 50, 51, 200])
@pytest.mark.parametrize("filling", ["_", "a_b", "webhook_u", "webhook_", "_url", "x" * 1000 + "_"])
def test_field_behind_any_number_of_underscores(before: int, filling: str) -> None:
    host = Host(see_json)
    sent = {"": [filling] * before}

    response = host.client.post("/", json={**sent, "webhook_url": URL})
    assert host.taken == {"webhook_url": URL}
    assert response.get_json() == sent

    response = host.client.post("/", json={**sent, "webhookurl": URL})
    assert host.taken is None
    assert response.get_json() == {**sent, "webhookurl": URL}


def test_client_that_goes_away_in_the_middle() -> None:
    host = Host(lambda: Response(request.get_data()))

    response = host.client.post(
        "/",
        input_stream=io.BytesIO(b'{"webhook_url": "'),
        content_type="application/json",
        environ_overrides={"CONTENT_LENGTH": "500"},
    )

    assert host.taken is None
    assert response.status_code == 400
