"""Collect everything of the package that users, clients and operators can see by name.

``python -m tests.unit.surface`` writes it to ``surface.json``, which :mod:`tests.unit.test_surface` compares
with what it finds. Renew it only for a decided change, and write that change into ``CHANGES.rst``.

Everything is observed from outside: public modules, an app on SQLite and fakeredis, its URL map, its commands
and its answers. Modules that are not public are not imported, so that they can be moved and rewritten.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import click
import fakeredis
import rq
from blinker import NamedSignal
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from rq.job import Callback, Job
from rq.registry import FailedJobRegistry
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from flask_rq_webhooks import Queue, RQWebhooks, __version__, callbacks, config, signals
from flask_rq_webhooks.testing import InMemoryReceiver, ReceivedWebhook, deliver_all
from tests.acceptance import tasks

SNAPSHOT = Path(__file__).with_name("surface.json")
RENEW = "python -m tests.unit.surface"

URL = "https://hooks.example.com/in?key=private"
SECRET = "a secret"
FORMATS = ("job", "standard", "task")


# -- a host app -------------------------------------------------------------------------------------------


class Host:
    """A host app with everything in this process, and a queue whose jobs wait or run at once."""

    def __init__(self, **settings: Any) -> None:
        self.redis = fakeredis.FakeRedis(server=fakeredis.FakeServer())
        self.app = Flask("host")
        self.app.config.update(
            TESTING=True, SECRET_KEY="tests", SQLALCHEMY_DATABASE_URI="sqlite://", **settings
        )
        self.db = SQLAlchemy(self.app)
        self.webhooks = RQWebhooks(self.app, db=self.db, redis=self.redis)
        self.webhooks.authorize(lambda permission, **what: True)
        self.client = self.app.test_client(use_cookies=False)

        @self.app.post("/runs/<runid>/<name>")
        @self.webhooks.accepts_webhook
        def call(runid: str, name: str) -> Any:
            return self._enqueue(name)

        @self.app.post("/trees/<runid>/<name>")
        @self.webhooks.accepts_webhook(scope="tree")
        def call_tree(runid: str, name: str) -> Any:
            return self._enqueue(name)

    def _enqueue(self, name: str) -> Any:
        queue = Queue("default", connection=self.redis, is_async=request.args.get("wait") is None)
        options: dict[str, Any] = {}
        if request.args.get("own"):
            options = {"on_success": Callback(tasks.note_success), "on_failure": Callback(tasks.note_failure)}
        job = queue.enqueue(getattr(tasks, name), *json.loads(request.args.get("args", "[]")), **options)
        return {"job_id": job.id}

    def submit(
        self,
        name: str,
        *args: Any,
        kind: str = "runs",
        at_once: bool = True,
        own: bool = False,
        **fields: Any,
    ) -> str:
        """Enqueue a job by a request with a webhook; return the job's id."""
        query = (
            {"args": json.dumps(args)} | ({"wait": "no"} if at_once else {}) | ({"own": "1"} if own else {})
        )
        answer = self.client.post(
            f"/{kind}/basin-7/{name}", query_string=query, json={"webhook_url": URL, **fields}
        )
        assert answer.headers["Webhook-Registered"] == "true", answer.text
        return str(answer.get_json()["job_id"])

    def close(self) -> None:
        self.app.extensions["rq_webhooks"].database.dispose()
        with self.app.app_context():
            self.db.engine.dispose()
        self.redis.close()


@contextmanager
def host(**settings: Any) -> Iterator[Host]:
    """Give a host app that the environment has no part in."""
    read = {variable for setting in config.SETTINGS for variable in setting.env}
    kept = {name: value for name, value in os.environ.items() if name not in read}
    with mock.patch.dict(os.environ, kept, clear=True):
        built = Host(**settings)
        try:
            yield built
        finally:
            built.close()


# -- what is read of it -----------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """Return key, environment variables in their order, and default of every setting."""
    return {
        f"RQ_WEBHOOKS_{setting.name}": {
            "default": repr(setting.default).replace(__version__, "<version>"),
            "environment": list(setting.env),
        }
        for setting in config.SETTINGS
    }


def names() -> dict[str, Any]:
    """Return the names of the public modules: classes with their bases and members, functions, signals."""
    found: dict[str, Any] = {}
    shown: dict[int, str] = {}
    for suffix in ("", ".errors", ".extension", ".receiver", ".signals", ".testing"):
        module = import_module(f"flask_rq_webhooks{suffix}")
        described = found[module.__name__] = {}
        for name in _exported(module):
            value = getattr(module, name)
            described[name] = shown.get(id(value)) or _described(value)
            shown[id(value)] = f"is {module.__name__}.{name}"
    return found


def _exported(module: ModuleType) -> list[str]:
    """Return ``__all__``, or the signals, classes and functions that *module* defines."""
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    if module is signals:  # what emits them is not for hosts
        return [name for name, value in found.items() if isinstance(value, NamedSignal)]
    return [
        name
        for name, value in found.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
    ]


def _described(value: Any) -> Any:
    if isinstance(value, NamedSignal):
        return f"signal {value.name!r}"
    if inspect.isclass(value):
        return {
            "bases": [base.__name__ for base in value.__bases__],
            # What RQ's classes are built with is RQ's.
            "call": "as RQ's" if value.__init__.__module__.startswith("rq.") else _signature(value),
            "members": {
                name: _signature(member) if callable(member) or isinstance(member, _WRAPPED) else "attribute"
                for name, member in vars(value).items()
                if not name.startswith("_")
            },
        }
    if inspect.isroutine(value):
        return _signature(value)
    return "constant"


_WRAPPED = (classmethod, staticmethod)


def _signature(function: Any) -> str:
    """Return names, kinds and defaults of the parameters; types are for the type checker."""
    function = function.__func__ if isinstance(function, _WRAPPED) else function
    try:
        signature = inspect.signature(function)
    except ValueError:
        return "(…)"
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    text = str(inspect.Signature(bare))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def routes() -> dict[str, Any]:
    """Return every rule we serve, and which permission is checked first, asked without any."""
    asked: list[str] = []

    def refuse(permission: str, **what: Any) -> bool:
        asked.append(f"{permission}({', '.join(sorted(what))})" if what else permission)
        return False

    found = {}
    with host() as here:
        here.webhooks.authorize(refuse)
        here.webhooks.tenant(lambda: "a customer")
        for rule in here.app.url_map.iter_rules():
            if not rule.endpoint.startswith("rq_webhooks."):
                continue
            path = re.sub(r"<[^>]+>", "some_id", rule.rule)
            for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                body = {} if method in ("POST", "PATCH", "PUT") else None
                for query in ("", "?runid=one") if rule.rule.endswith("/events") else ("",):
                    asked.clear()
                    here.client.open(path + query, method=method, json=body)
                    found[f"{rule.rule}{query} {method}"] = f"{', '.join(asked) or 'open'} → {rule.endpoint}"
    return found


def openapi() -> dict[str, Any]:
    """Return the operations of the API with their parameters, bodies and answers, and the fields of each."""
    with host() as here:
        document = here.client.get("/webhooks/openapi.json").get_json()
    operations = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if not isinstance(operation, dict):
                continue
            parameters = [*item.get("parameters", []), *operation.get("parameters", [])]
            operations[f"{path} {method.upper()}"] = {
                "answers": {
                    status: _schema_names(answer) for status, answer in operation["responses"].items()
                },
                "body": _schema_names(operation.get("requestBody", {})),
                "parameters": sorted(
                    f"{parameter['in']} {parameter['name']}" if "in" in parameter else parameter["$ref"]
                    for parameter in parameters
                ),
            }
    schemas = {
        name: sorted(schema.get("properties", {}))
        for name, schema in document["components"]["schemas"].items()
    }
    return {"operations": operations, "schemas": schemas}


def _schema_names(value: Any) -> str:
    refs = re.findall(r"#/components/[^/]+/(\w+)", json.dumps(value))
    return ", ".join(dict.fromkeys(refs))


def request_fields() -> dict[str, Any]:
    """Return what a request is answered that gives a wrong value for one field."""
    fields = {
        "webhook_url": 7, "webhook_secret": "", "webhook_headers": 7, "sign_payload": 7, "webhook_events": 7,
        "webhook_format": "none", "webhook_reference": [1], "webhook_timeout": -1, "webhook_retry_count": 99,
    }  # fmt: skip
    found: dict[str, Any] = {}
    with host() as here:
        for field, wrong in fields.items():
            answer = here.client.post("/runs/basin-7/add", json={"webhook_url": URL, field: wrong})
            error = answer.get_json()["error"]
            found[field] = f"{answer.status_code} {error['code']}: {', '.join(error['details'])}"
            found["error"] = sorted(error)
    return found


def deliveries() -> dict[str, Any]:
    """Return bodies and headers of what clients get; names stand for ids, times and signatures."""
    bodies: dict[str, Any] = {}
    headers: dict[str, Any] = {}
    with host(RQ_WEBHOOKS_SIGNING_SECRET="the server's") as here:
        for format_name in FORMATS:
            for name, submit in _ENDINGS.items():
                fields = {"webhook_format": format_name, "webhook_reference": "ours"}
                job_id = submit(here, fields)
                received = deliver_all(here.app) or deliver_all(here.app)
                bodies[f"{format_name}, {name}"] = [_body(webhook, job_id) for webhook in received]
        job_id = here.submit("run_model", "basin-7", kind="trees")
        bodies["job, tree"] = [_body(webhook, job_id) for webhook in deliver_all(here.app)]
        signed = {
            "unsigned": {},
            "signed": {"webhook_secret": SECRET},
            "signed, server's secret": {"sign_payload": True},
            "signed, task": {"webhook_secret": SECRET, "webhook_format": "task"},
            "own headers": {"webhook_headers": {"X-Tenant": "seven"}},
        }
        for name, fields in signed.items():
            here.submit("add", 1, 2, **fields)
            headers[name] = _headers_of(here, "the server's" if "sign_payload" in fields else SECRET)
        here.submit("add", 1, 2)
        headers["second attempt"] = _headers_of(here, SECRET, InMemoryReceiver(500, 204))
        bodies.update(_of_standing_endpoints(here))
    with host(RQ_WEBHOOKS_HEADER_PREFIX="X-Guardrails") as here:
        for format_name in ("job", "task"):
            here.submit("add", 1, 2, webhook_secret=SECRET, webhook_format=format_name)
            headers[f"signed, {format_name}, prefix X-Guardrails"] = _headers_of(here, SECRET)
    return {"bodies": bodies, "headers": headers}


def _stopped(here: Host, fields: dict[str, Any]) -> str:
    """Do what a worker does when a job is stopped, without its process."""
    job_id = here.submit("sleep", 0, at_once=False, **fields)
    job = Job.fetch(job_id, connection=here.redis)
    queue = rq.Queue("default", connection=here.redis)
    queue.remove(job)
    job.stopped_callback(job, here.redis)
    job.set_status("stopped")  # type: ignore[arg-type]
    FailedJobRegistry(queue=queue).add(job, -1)
    return job_id


def _canceled(here: Host, fields: dict[str, Any]) -> str:
    job_id = here.submit("add", 1, 2, at_once=False, **fields)
    Job.fetch(job_id, connection=here.redis).cancel()
    return job_id


def _deleted(here: Host, fields: dict[str, Any]) -> str:
    job_id = here.submit("add", 1, 2, at_once=False, **fields)
    Job.fetch(job_id, connection=here.redis).delete()
    return job_id


_ENDINGS: dict[str, Callable[[Host, dict[str, Any]], str]] = {
    "success": lambda here, fields: here.submit("run_model", "basin-7", **fields),
    "failure": lambda here, fields: here.submit("fail", "no rain data – “dry”", **fields),
    "stopped": _stopped,
    "canceled": _canceled,
    "lost": _deleted,
}


def _of_standing_endpoints(here: Host) -> dict[str, Any]:
    made = here.client.post("/webhooks/api/endpoints", json={"url": URL, "events": ["model.published"]})
    assert made.status_code == 201, made.text
    here.client.post(f"/webhooks/api/endpoints/{made.get_json()['id']}/test")
    found = {"job, ping": [_body(webhook) for webhook in deliver_all(here.app)]}
    with here.app.app_context():
        here.webhooks.send("model.published", {"model": "weir"}, runid="basin-7")
    return found | {"job, application event": [_body(webhook) for webhook in deliver_all(here.app)]}


def _body(webhook: ReceivedWebhook, job_id: str | None = None) -> str:
    text = webhook.body.decode()
    if job_id is not None:
        text = text.replace(job_id, "<job id>")
    text = text.replace(str(webhook.header("webhook-id")), "<event id>")
    text = re.sub(r"\bep\w{10,}", "<endpoint id>", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?", lambda m: f"<time{'.6' if m[1] else ''}>", text)
    text = re.sub(r"\b\d{10}\.\d+\b", "<unix.fraction>", re.sub(r"\b\d{10}\b(?!\.)", "<unix>", text))
    # RQ's own frames are in it, and differ between its versions.
    return re.sub(
        r'"(Traceback \(most recent call last\)):[^"]*(?:\\"[^"]*)*?(ValueError: (?:[^"\\]|\\.)*)"',
        r'"\1: … \2"',
        text,
    )


def _headers_of(here: Host, secret: str, receiver: InMemoryReceiver | None = None) -> list[str]:
    """Return the headers of the last request, in order; signatures are checked, not shown."""
    webhook = deliver_all(here.app, receiver)[-1]
    stamp = f"{webhook.header('webhook-id')}.{webhook.header('webhook-timestamp')}.".encode()
    standard = hmac.digest(secret.encode(), stamp + webhook.body, hashlib.sha256)
    known = {
        f"v1,{base64.b64encode(standard).decode()}": "v1,<base64 HMAC-SHA256 of id.timestamp.body>",
        f"sha256={hmac.digest(secret.encode(), webhook.body, hashlib.sha256).hex()}": (
            "sha256=<hex HMAC-SHA256 of the body>"
        ),
        str(webhook.header("webhook-id")): "<event id>",
    }
    shown = []
    for name, value in webhook.headers.items():
        value = known.get(value, value).replace(__version__, "<version>")
        value = re.sub(r"^\d{10}$", "<unix>", value)
        value = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?", "<time>", value)
        shown.append(f"{name}: {re.sub(r'^dlv_[0-9a-z]+$', '<delivery id>', value)}")
    return shown


def sql() -> dict[str, Any]:
    """Return our tables in the host's metadata, as each database creates them."""
    dialects: dict[str, Any] = {"sqlite": sqlite.dialect(), "postgresql": postgresql.dialect()}
    with host() as here:
        tables = [table for table in here.db.metadata.sorted_tables if table.name.startswith("rq_webhooks")]
    found: dict[str, Any] = {}
    for name, dialect in dialects.items():
        for table in tables:
            text = str(CreateTable(table).compile(dialect=dialect))
            lines = [re.sub(r"\s+", " ", line).strip().rstrip(", ") for line in text.strip().splitlines()]
            rules = [line for line in lines if re.match("PRIMARY|FOREIGN|UNIQUE|CONSTRAINT|CHECK", line)]
            indexes = [str(CreateIndex(index).compile(dialect=dialect)) for index in table.indexes]
            found.setdefault(name, {})[table.name] = {
                "columns": [line for line in lines[1:-1] if line and line not in rules],
                "indexes": sorted(indexes),
                "rules": sorted(rules),  # SQLAlchemy keeps them in a set
            }
    return found


def in_redis() -> dict[str, Any]:
    """Return what a job carries, and what its end leaves for the dispatcher."""

    def neutral(text: str) -> str:
        return re.sub(r"\bep[0-9a-z]{4,}(_[0-9a-z]+)?", lambda m: "ep…_…" if m[1] else "ep…", text)

    carried, entries = {}, {}
    with host(RQ_WEBHOOKS_OUTBOX_MAXLEN=500) as here:
        carried["plain, OUTBOX_MAXLEN=500"] = _callback_names(here, neutral, own=False)
    with host() as here:
        for name, own in (("plain", False), ("with callbacks of the user", True)):
            carried[name] = _callback_names(here, neutral, own=own)
        for ending in ("success", "failure", "stopped"):
            _ENDINGS[ending](here, {})
        for key in here.redis.scan_iter("rq_webhooks:*", _type="stream"):
            for _, entry in here.redis.xrange(key):
                said = json.loads(entry[b"entry"])
                entries[said["kind"]] = {
                    "fields": sorted(field.decode() for field in entry),
                    "key": neutral(key.decode()),
                    "keys": list(said),
                    "version": said["v"],
                }
    return {"callbacks": carried, "outbox entries": entries, "prefix": callbacks.OUTBOX_KEY_PREFIX}


def _callback_names(here: Host, neutral: Callable[[str], str], *, own: bool) -> dict[str, str]:
    job_id = here.submit("add", 1, 2, at_once=False, own=own)
    job: dict[bytes, bytes] = here.redis.hgetall(f"rq:job:{job_id}")
    return {
        field.decode(): neutral(value.decode())
        for field, value in job.items()
        if field.endswith(b"_callback_name")
    }


def commands() -> dict[str, Any]:
    """Return every command with its arguments and options; what the help says of them may change."""
    (entry_point,) = {
        point.name: point for point in entry_points(group="flask.commands") if point.name == "rq-webhooks"
    }.values()
    found: dict[str, Any] = {}

    def walk(command: click.Command, path: str) -> None:
        found[path] = [_parameter(parameter) for parameter in command.params]
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")

    walk(entry_point.load(), "rq-webhooks")
    with host() as here:
        runner = here.app.test_cli_runner()
        for path in found:  # the app's own commands are these
            done = runner.invoke(args=[*path.split(), "--help"])
            assert done.exit_code == 0, (path, done.output)
            for command in found:
                if command.rpartition(" ")[0] == path:
                    assert f"  {command.rpartition(' ')[2]}" in done.output, (path, command)
    return found


def _parameter(parameter: click.Parameter) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    kind = parameter.type
    shown = "|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else kind.name
    parts = [parameter.param_type_name, ", ".join(names)]
    if getattr(parameter, "is_flag", False):
        parts.append("flag")
    else:
        if isinstance(kind, click.IntRange | click.FloatRange):
            shown += f" {kind.min}..{'' if kind.max is None else kind.max}"
        parts.append(shown)
        if isinstance(parameter.default, str | int | float):
            parts.append(f"default {parameter.default}")
    parts += [word for word in ("required", "multiple") if getattr(parameter, word, False)]
    return " ".join(parts + ([f"× {parameter.nargs}"] if parameter.nargs != 1 else []))


def answers() -> dict[str, Any]:
    """Return metrics and JSON keys of what operators and clients ask, and the keywords of the signals."""
    heard: dict[str, list[str]] = {}
    listening = {name: value for name, value in vars(signals).items() if isinstance(value, NamedSignal)}

    def noting(name: str) -> Callable[..., None]:
        return lambda sender, **what: heard.setdefault(name, sorted(what)) and None

    with host(RQ_WEBHOOKS_DISABLE_AFTER=1) as here, ExitStack() as stack:
        for name, signal in listening.items():
            stack.enter_context(signal.connected_to(noting(name)))
        good = here.submit("add", 1, 2)
        here.submit("fail", "dry")
        deliver_all(here.app, InMemoryReceiver(204, 500, 410))
        here.client.post("/webhooks/api/endpoints", json={"url": URL, "events": ["job.success"]})
        with here.app.app_context():
            here.webhooks.send("model.published", {"model": "weir"})
        made = here.client.post("/webhooks/api/endpoints", json={"url": URL, "events": ["model.published"]})
        assert made.status_code == 201, made.text
        here.client.post(f"/webhooks/api/endpoints/{made.get_json()['id']}/test")
        deliver_all(here.app, InMemoryReceiver(410))
        delivery = here.client.get("/webhooks/api/deliveries").get_json()["items"][0]["id"]
        paths = {
            "/health": "/webhooks/health",
            "/jobs/<id>": f"/webhooks/jobs/{good}",
            "/jobs/<unknown>": "/webhooks/jobs/unknown",
            "/api/deliveries": "/webhooks/api/deliveries",
            "/api/deliveries/<id>": f"/webhooks/api/deliveries/{delivery}",
            "/api/endpoints": "/webhooks/api/endpoints",
            "/api/events": "/webhooks/api/events",
            "/api/stats": "/webhooks/api/stats",
        }
        found: dict[str, Any] = {
            name: sorted(set(_keys(here.client.get(path).get_json()))) for name, path in paths.items()
        }
        metrics = here.client.get("/webhooks/metrics").get_data(as_text=True)
        found["/metrics"] = sorted(re.findall(r"^# TYPE (.+)$", metrics, re.M))
        labelled = re.findall(r"^(\w+)\{(.*)\}", metrics, re.M)
        found["/metrics, labels"] = sorted(
            {" ".join((name, *re.findall(r"(\w+)=", labels))) for name, labels in labelled}
        )
        template = here.app.jinja_env.get_template("rq_webhooks/_macros.html")
        found["templates"] = {
            "globals": sorted(name for name in here.app.jinja_env.globals if name.startswith("rq_webhooks")),
            "macros": sorted(name for name in vars(template.module) if not name.startswith("_")),
        }
    return found | {"signals": {name: heard.get(name, "not sent here") for name in listening}}


def _keys(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every key of a JSON document."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield (here := f"{path}.{key}" if path else key)
            yield from _keys(below, here)
    elif isinstance(value, list):
        for below in value:
            yield from _keys(below, f"{path}[]")


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "answers": answers,
    "commands": commands,
    "deliveries": deliveries,
    "names": names,
    "openapi": openapi,
    "redis": in_redis,
    "request fields": request_fields,
    "routes": routes,
    "settings": settings,
    "sql": sql,
}


def as_text(section: Any) -> str:
    """Return *section* as it stands in the file: sorted, one thing a line."""
    return json.dumps(section, indent=1, sort_keys=True, ensure_ascii=False)


if __name__ == "__main__":
    SNAPSHOT.write_text(as_text({name: collect() for name, collect in SECTIONS.items()}) + "\n")
