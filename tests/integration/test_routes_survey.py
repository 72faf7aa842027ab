"""``flask rq-webhooks routes`` and ``observe_routes`` on views written in many ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import rq
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import FlaskGroup
from flask.views import MethodView

from flask_rq_webhooks import Queue as OurQueue
from flask_rq_webhooks import RQWebhooks
from flask_rq_webhooks.accept.route_report import Route, survey
from flask_rq_webhooks.queue import job_callbacks
from flask_rq_webhooks.testing import observe_routes
from tests.hosts import enqueueing, jobs
from tests.hosts.many_views import create_app, webhooks


@pytest.fixture(autouse=True)
def _instrumented() -> Iterator[None]:
    """Let plain queues carry webhooks, as most of these views need."""
    job_callbacks.instrument()
    yield
    job_callbacks.uninstrument()


@pytest.fixture
def routes() -> dict[str, list[Route]]:
    """Give what is read of every view, by view name."""
    found: dict[str, list[Route]] = {}
    for route in survey(create_app()):
        found.setdefault(route.view.rpartition(".")[2], []).append(route)
    return found


def run(app: Flask, *arguments: str) -> Result:
    return CliRunner().invoke(
        FlaskGroup(create_app=lambda: app, set_debug_flag=False), ["rq-webhooks", "routes", *arguments]
    )


#: Views that enqueue, themselves or in the functions they call.
MISSING = ["class", "context", "delay", "direct", "global_queue", "lambda", "made_by_hand"]
#: Views that enqueue further away, or through what the source does not name.
FURTHER = [
    "async", "careless", "imported_wrapper", "in_blueprint", "local_import", "logged", "nested_helper",
    "object", "partial", "partial_inside", "through_module",
]  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_views_that_enqueue(routes: dict[str, list[Route]], name: str) -> None:
    (route,) = routes[f"missing_{name}"]
    assert route.webhook == "missing"
    assert not route.decorated
    assert route.place is not None
    assert route.place.certain, route.place


@pytest.mark.parametrize("name", [f"missing_{name}" for name in FURTHER] + [
    "may_current_app", "may_untyped", "may_mentioned", "unseen_object", "none_describe",
    "decorated", "decorated_async", "decorated_below_another", "decorated_below_careless",
    "decorated_view_called",
])  # fmt: skip
def test_what_the_source_does_not_say_for_sure_is_not_claimed(
    routes: dict[str, list[Route]], name: str
) -> None:
    """Neither that it enqueues, nor that it does not, nor that a webhook goes with it."""
    (route,) = routes[name]
    assert route.webhook == "unknown"


def test_helper(routes: dict[str, list[Route]]) -> None:
    (route,) = routes["helper"]
    assert route.webhook == "helper"


@pytest.mark.parametrize("name", ["none_reads", "none_mail", "none_recursive"])
def test_views_that_enqueue_nothing(routes: dict[str, list[Route]], name: str) -> None:
    (route,) = routes[name]
    assert route.webhook == "none"
    assert route.complete


def test_decorated_view_with_a_plain_queue_is_reported_unless_instrumented() -> None:
    app = Flask("host")

    @app.post("/plain")
    @webhooks.accepts_webhook
    def plain() -> str:
        return enqueueing.get_queue().enqueue(jobs.build, "a").id

    @app.post("/ours")
    @webhooks.accepts_webhook
    def ours() -> str:
        return OurQueue(connection=enqueueing.connection).enqueue(jobs.build, "a").id

    @app.post("/helper")
    def helper() -> str:
        return webhooks.enqueue_with_webhook(enqueueing.get_queue(), jobs.build, ("a",)).id

    def judged() -> dict[str, str]:
        return {route.view: route.webhook for route in survey(app)}

    assert judged() == {"plain": "decorator", "ours": "decorator", "helper": "helper"}
    assert run(app, "--check").exit_code == 0
    job_callbacks.uninstrument()
    assert judged() == {"plain": "unattached", "ours": "decorator", "helper": "helper"}
    result = run(app, "--check")
    assert result.exit_code == 1
    assert " PLAIN QUEUE " in result.output


def test_decorated_view_with_a_job_made_elsewhere_is_not_called_covered() -> None:
    app = Flask("host")

    @app.post("/by-hand")
    @webhooks.accepts_webhook
    def by_hand() -> str:
        queue = OurQueue(connection=enqueueing.connection)
        job = rq.job.Job.create(jobs.build, ("a",), connection=enqueueing.connection)
        return queue.enqueue_job(job).id

    @app.post("/watched")
    @webhooks.accepts_webhook
    def watched() -> str:
        queue = OurQueue(connection=enqueueing.connection)
        job = rq.job.Job.create(jobs.build, ("a",), connection=enqueueing.connection)
        webhooks.watch(job)
        return queue.enqueue_job(job).id

    @app.post("/created")
    @webhooks.accepts_webhook
    def created() -> str:
        queue = OurQueue(connection=enqueueing.connection)
        return queue.enqueue_job(queue.create_job(jobs.build, ("a",))).id

    assert {route.view: route.webhook for route in survey(app)} == {
        "by_hand": "unknown", "watched": "helper", "created": "decorator",
    }  # fmt: skip


def test_methods_of_a_method_view_are_judged_one_by_one(routes: dict[str, list[Route]]) -> None:
    def judged(name: str) -> dict[tuple[str, ...], str]:
        return {route.methods: route.webhook for route in routes[name]}

    assert judged("missing_method_view") == {("GET",): "none", ("POST",): "missing"}
    assert judged("decorated_method_view") == {("GET",): "unknown", ("POST",): "decorator"}
    assert judged("half_decorated") == {("GET",): "none", ("POST",): "unknown", ("PUT",): "missing"}


def test_the_function_between_is_named(routes: dict[str, list[Route]]) -> None:
    (route,) = routes["missing_made_by_hand"]
    assert route.place is not None
    assert route.place.through == "tests.hosts.enqueueing.enqueue_job_made_by_hand"
    assert route.place.file == enqueueing.__file__
    line = Path(enqueueing.__file__).read_text().splitlines()[route.place.line - 1]
    assert "queue.enqueue_job(made)" in line


def test_every_view_of_the_host_is_judged_here(routes: dict[str, list[Route]]) -> None:
    others = {name for name in routes if name.startswith("missing_")}
    assert others - {f"missing_{name}" for name in MISSING + FURTHER} == {"missing_method_view"}


# -- the command --------------------------------------------------------------------------------------------


def test_table_and_exit_status() -> None:
    app = create_app()
    result = run(app)
    assert result.exit_code == 0, result.output
    header, *lines, total = result.output.splitlines()
    assert header.split() == ["ROUTE", "METHODS", "VIEW", "WEBHOOK", "ENQUEUES"]
    by_view = {line.split()[2]: line for line in lines}
    assert " MISSING         q.enqueue_call (tests/hosts/many_views.py:" in by_view["missing_direct"]
    assert by_view["missing_made_by_hand"].endswith(" < tests.hosts.enqueueing.enqueue_job_made_by_hand")
    assert " yes, by helper  webhooks.enqueue_with_webhook (" in by_view["helper"]
    assert {"none_reads", "may_untyped", "decorated"}.isdisjoint(by_view)
    missing = sum(" MISSING " in line for line in lines)
    assert f" {missing} of them without a webhook; " in total
    assert " cannot be judged from tests or source (--all lists them)." in total
    assert run(app, "--check").exit_code == 1
    every = {line.split()[2]: line for line in run(app, "--all").output.splitlines()[1:-1]}
    assert " cannot tell     may: q.enqueue (" in every["may_untyped"]
    assert every["decorated"].endswith(" cannot tell     nothing found")
    assert every["none_reads"].endswith(" -")


def test_ignored_views_do_not_fail_the_check() -> None:
    app = Flask("host")

    @app.post("/a")
    def a() -> str:
        return enqueueing.get_queue().enqueue(jobs.build, "a").id

    assert run(app, "--check").exit_code == 1
    result = run(app, "--check", "--ignore", "a")
    assert result.exit_code == 0, result.output
    assert " ignored " in result.output
    result = run(app, "--check", "--ignore", "b")
    assert result.exit_code == 2
    assert "no view 'b'" in result.output


def test_all_and_json() -> None:
    listed = json.loads(run(create_app(), "--all", "--json").output)
    by_view = {route["view"]: route for route in listed}
    assert by_view["none_reads"]["webhook"] == "none"
    assert by_view["none_reads"]["enqueues"] == "no"
    assert by_view["may_untyped"]["enqueues"] == "cannot tell"
    direct = by_view["missing_direct"]
    assert (direct["rule"], direct["methods"]) == ("/missing/direct/<runid>", ["POST"])
    assert direct["places"][0]["call"] == "q.enqueue_call"
    assert by_view["missing_made_by_hand"]["places"][0]["through"] == (
        "tests.hosts.enqueueing.enqueue_job_made_by_hand"
    )
    assert direct["observed"] is None


def test_our_own_routes_are_not_listed() -> None:
    app = Flask("host")
    app.config.update(RQ_WEBHOOKS_DATABASE_URI="sqlite://", SECRET_KEY="tests")
    RQWebhooks(app)
    assert json.loads(run(app, "--all", "--json").output) == []
    assert run(app, "--check").exit_code == 0


def test_an_app_without_the_extension_can_be_read() -> None:
    app = Flask("host")
    app.add_url_rule("/a", "a", lambda: enqueueing.get_queue().enqueue(jobs.build, "a").id)
    assert "rq_webhooks" not in app.extensions
    assert "MISSING" in run(app).output


def test_what_a_view_imports_may_be_missing() -> None:
    app = Flask("host")

    @app.post("/a")
    def a() -> str:
        from tests.no_such_module import push  # type: ignore[import-not-found]

        return str(push())

    (route,) = survey(app)
    assert (route.webhook, route.complete) == ("unknown", False)


def test_annotations_and_inherited_methods_say_what_an_object_is() -> None:
    app = Flask("host")

    def push(queue: rq.Queue, runner: enqueueing.Runner, other: rq.Queue | None = None) -> str:
        return queue.enqueue(jobs.build, runner.describe()).id

    class Base(MethodView):
        def post(self) -> str:
            return self.start()

        def start(self) -> str:
            raise NotImplementedError

    class Child(Base):
        def start(self) -> str:
            return push(enqueueing.get_queue(), enqueueing.Runner("a"))

    class Grandchild(Child):
        def start(self) -> str:
            queue = enqueueing.get_queue()
            return queue.enqueue(jobs.build, "a").id

    app.add_url_rule("/a", view_func=Child.as_view("a"))
    app.add_url_rule("/b", view_func=Grandchild.as_view("b"))
    deep, near = sorted(survey(app), key=lambda route: route.rule)
    assert deep.webhook == "unknown"  # start is one level deep, push would be two
    assert near.webhook == "missing"
    assert near.place is not None
    assert near.place.through.endswith("Grandchild.start")


def test_an_app_that_is_installed_is_the_hosts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "installed_host"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from flask import Flask\n"
        "app = Flask(__name__)\n"
        "@app.post('/a')\n"
        "def a(queue: 'Queue' = None):\n"
        "    queue = 'get_queue'\n"
        "    from .queues import push\n"
        "    return push()\n"
    )
    (package / "queues.py").write_text(
        "import rq\n"
        "def get_queue(connection=None) -> rq.Queue:\n"
        "    return rq.Queue(connection=connection)\n"
        "def push():\n"
        "    return get_queue().enqueue(print).id\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    import installed_host.queues  # noqa: F401
    from installed_host import app  # type: ignore[import-not-found]

    (route,) = survey(app)
    assert route.webhook == "missing"
    assert route.place is not None
    assert route.place.through == "installed_host.queues.push"


def test_views_without_source_and_callable_objects() -> None:
    app = Flask("host")

    class Callable:
        def __call__(self) -> str:
            return enqueueing.get_queue().enqueue(jobs.build, "a").id

    namespace: dict[str, Any] = {"queue": enqueueing.get_queue()}
    exec("def made_of_text():\n    return queue.enqueue(print).id", namespace)
    app.add_url_rule("/a", "made_of_text", namespace["made_of_text"])
    app.add_url_rule("/b", "callable_object", Callable())
    made_of_text, callable_object = sorted(survey(app), key=lambda route: route.rule)
    assert (made_of_text.webhook, made_of_text.complete) == ("unknown", False)
    assert callable_object.webhook == "missing"


# -- by observation -----------------------------------------------------------------------------------------


@pytest.fixture
def host(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """Give the app on a queue in memory."""
    app = create_app()
    client = fakeredis.FakeStrictRedis()
    monkeypatch.setattr(enqueueing, "connection", client)
    monkeypatch.setattr("tests.hosts.many_views.queue", enqueueing.get_queue())
    app.config.update(RQ_WEBHOOKS_DATABASE_URI=sqlite_url, SECRET_KEY="tests")
    app.task_queue = enqueueing.get_queue()  # type: ignore[attr-defined]
    webhooks.init_app(app)
    return app


def called(app: Flask) -> dict[str, Any]:
    """Call every route of *app* once."""
    client = app.test_client()
    answers = {}
    for rule in app.url_map.iter_rules():
        if rule.endpoint.startswith(("rq_webhooks", "static", "missing_delay")):
            continue
        with app.test_request_context():
            url = str(rule.build({argument: 1 for argument in rule.arguments})[1])  # type: ignore[index]
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            answers[f"{rule.endpoint} {method}"] = client.open(url, method=method, json={})
    return answers


def test_what_tests_observed_is_the_truth(host: Flask, tmp_path: Path) -> None:
    with observe_routes(host) as observed:
        answers = called(host)
    assert {answer.status_code for answer in answers.values()} == {200}

    enqueuing = {f"missing_{name}" for name in [*MISSING, *FURTHER, "method_view"]}
    enqueuing = {name.replace("missing_in_blueprint", "api.missing_in_blueprint") for name in enqueuing}
    # `missing_delay` is bound to a connection of its own and was not called.
    enqueuing = enqueuing - {"missing_delay"} | {"half_decorated", "unseen_object"}
    assert set(observed.missing) == enqueuing | {"may_current_app", "may_untyped", "may_mentioned"}
    by_view = {(job.view, job.method): job for job in observed.jobs}
    assert by_view["helper", "POST"].webhook == "helper"
    assert by_view["decorated_below_careless", "POST"].webhook == "decorator"
    assert by_view["half_decorated", "POST"].webhook == "decorator"
    assert by_view["half_decorated", "PUT"].webhook == "missing"
    assert by_view["missing_made_by_hand", "POST"].made_elsewhere
    assert by_view["missing_direct", "POST"].func == "tests.hosts.jobs.build"
    assert not any(view.startswith("none_") for view, _ in by_view)

    observed.save(tmp_path / "observed.json")
    before = run(host)
    after = json.loads(run(host, "--all", "--json", "--observed", str(tmp_path / "observed.json")).output)
    assert "unseen_object" not in before.output
    webhook = {(route["view"], method): route["webhook"] for route in after for method in route["methods"]}
    assert {view for (view, _), word in webhook.items() if word == "missing"} == (
        set(observed.missing) | {"missing_delay"}
    )
    assert [view for (view, _), word in webhook.items() if word == "unknown"] == []
    assert webhook["decorated", "POST"] == webhook["half_decorated", "POST"] == "decorator"
    assert webhook["none_describe", "GET"] == webhook["decorated_method_view", "GET"] == "none"


def test_watched_job_is_observed_as_carried(host: Flask) -> None:
    @host.post("/watched")
    @webhooks.accepts_webhook
    def watched() -> Any:
        job = enqueueing.enqueue_job_made_by_hand("a")
        webhooks.watch(job)
        return {"job_id": job.id}

    with observe_routes(host) as observed:
        host.test_client().post("/watched")

    assert [(job.view, job.webhook) for job in observed.jobs] == [("watched", "helper")]


def test_observation_of_a_decorated_view_with_a_plain_queue(host: Flask, tmp_path: Path) -> None:
    job_callbacks.uninstrument()
    with observe_routes(host) as observed:
        host.test_client().post("/decorated/1")
        host.test_client().post("/helper/1", json={})
    assert [job.webhook for job in observed.jobs] == ["unattached", "helper"]
    assert observed.missing == ["decorated"]


def test_observation_ends(host: Flask) -> None:
    with observe_routes(host) as observed:
        pass
    host.test_client().post("/missing/direct/1")
    assert observed.jobs == []
    assert "observing" not in repr(enqueueing.get_queue().enqueue_job)


def test_jobs_outside_of_requests_do_not_count(host: Flask) -> None:
    with observe_routes(host) as observed, host.app_context():
        enqueueing.get_queue().enqueue(jobs.build, "a")
    assert observed.jobs == []


def test_jobs_of_another_app_do_not_count(host: Flask) -> None:
    with observe_routes(Flask("other")) as observed:
        host.test_client().post("/missing/direct/1")
    assert observed.jobs == []


@pytest.mark.parametrize("content", ["{", "[1]", '[{"view": "a"}]'])
def test_a_file_that_is_no_observation(content: str, tmp_path: Path) -> None:
    file = tmp_path / "observed.json"
    file.write_text(content)
    result = run(create_app(), "--observed", str(file))
    assert result.exit_code == 2
    assert "--observed" in result.output
