"""The commands, run as a user runs them; the long-running ones as processes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
import requests
import sqlalchemy as sa
from click.testing import CliRunner, Result
from flask import Flask
from flask.cli import FlaskGroup

from flask_rq_webhooks import RQWebhooks
from flask_rq_webhooks.cli import cli
from flask_rq_webhooks.observe.conclusions import CALLBACK_GRACE
from flask_rq_webhooks.protocol.signatures import signature_headers
from flask_rq_webhooks.receiver import verify
from flask_rq_webhooks.state import State, get_state
from flask_rq_webhooks.storage import dispatchers
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.endpoints import NewEndpoint
from flask_rq_webhooks.storage.queries import list_endpoints
from flask_rq_webhooks.storage.standing_endpoints import create_standing
from tests.pipeline import add_endpoint, attempts, deliveries, enqueue
from tests.servers import ROOT, PostgresHandle, Process, Receiver, free_port


@pytest.fixture
def host(sqlite_url: str, redis_url: str) -> Iterator[Flask]:
    made = Flask("host")
    made.config.update(
        SECRET_KEY="a key for tests only",
        RQ_WEBHOOKS_DATABASE_URI=sqlite_url,
        RQ_WEBHOOKS_REDIS_URL=redis_url,
        RQ_WEBHOOKS_ALLOW_HTTP=True,
        RQ_WEBHOOKS_RETRY_SCHEDULE=[],
    )
    webhooks = RQWebhooks(made)

    @webhooks.authorize
    def may(permission: str, **_what: Any) -> bool:
        return True

    yield made
    state = get_state(made)
    state.database.dispose()
    state.redis.close()


@pytest.fixture
def state(host: Flask) -> State:
    """Give the host's state, on empty tables."""
    state = get_state(host)
    state.database.create_tables()
    return state


def run(host: Flask, *arguments: str) -> Result:
    # As `flask` itself does it: the commands are found through their entry point.
    command = FlaskGroup(create_app=lambda: host, set_debug_flag=False)
    return CliRunner().invoke(command, ["rq-webhooks", *arguments])


def test_the_app_itself_knows_the_commands(host: Flask, state: State) -> None:
    runner = host.test_cli_runner()
    asked_app = runner.invoke(args=["rq-webhooks", "doctor"])
    asked_command = runner.invoke(host.cli.commands["rq-webhooks"], ["doctor"])
    # But for the difference of the clocks:
    said = [one.output for one in (asked_app, asked_command, run(host, "doctor"))]
    assert len({re.sub(r"[-+]?\d+\.\d+ s", "", one) for one in said}) == 1, said
    assert asked_app.exit_code == asked_command.exit_code == 1  # no dispatcher
    assert "rq-webhooks" in runner.invoke(args=["--help"]).output
    failed = runner.invoke(args=["rq-webhooks", "resend", "dlv_unknown"])
    assert (failed.exit_code, failed.output) == (1, "Error: There is no delivery 'dlv_unknown'.\n")
    assert runner.invoke(args=["rq-webhooks", "endpoints", "list"]).exit_code == 0


def test_the_commands_are_listed_once(host: Flask) -> None:
    command = FlaskGroup(create_app=lambda: host, set_debug_flag=False)
    listed = CliRunner().invoke(command, ["--help"]).output
    assert listed.count("rq-webhooks") == 1
    assert "Deliver webhooks for RQ jobs" in listed


def test_web_processes_do_not_load_the_commands() -> None:
    code = (
        "import sys; from flask import Flask; from flask_rq_webhooks import RQWebhooks; app = Flask('web'); "
        "app.config['RQ_WEBHOOKS_DATABASE_URI'] = 'sqlite://'; RQWebhooks(app); "
        "assert 'rq-webhooks' in app.cli.commands; print('flask_rq_webhooks.cli' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_commands_explain_what_is_missing_without_the_extension() -> None:
    result = run(Flask("bare"), "worker", "--burst")
    assert result.exit_code == 1
    assert "not initialised" in result.output
    assert "init_app" in result.output


def test_worker_without_tables_says_what_to_run(host: Flask) -> None:
    result = run(host, "worker", "--burst")
    assert result.exit_code == 1
    assert "init-db" in result.output


def test_init_db_creates_what_is_missing(host: Flask) -> None:
    first, second = run(host, "init-db"), run(host, "init-db")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "created table rq_webhooks_delivery" in first.output
    assert second.output == "The tables are up to date.\n"


def test_worker_burst_delivers(host: Flask, state: State, receiver: Receiver) -> None:
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    result = run(host, "worker", "--burst", "--concurrency", "2")
    assert result.exit_code == 0, result.output
    assert len(receiver.received) == 1


def test_trigger_sends_a_signed_ping(host: Flask, receiver: Receiver) -> None:
    result = run(host, "trigger", receiver.url, "--secret", "s3cret")
    assert result.exit_code == 0, result.output
    (received,) = receiver.received
    verify(received.body, received.headers, "s3cret")
    assert received.json["event"] == "webhook.ping"
    assert received.headers["X-Webhook-Event"] == "webhook.ping"
    assert "answer 204" in result.output
    assert "s3cret" not in result.output


@pytest.mark.parametrize("what", ["refused", "blocked", "status", "format"])
def test_trigger_fails_with_the_reason(host: Flask, receiver: Receiver, what: str) -> None:
    receiver.respond = lambda received: (500, {}, b"broken \x1b[31m")
    arguments, said = {
        "refused": ([f"http://127.0.0.1:{free_port()}/"], "error connect"),
        "blocked": (["https://10.0.0.1/"], "error blocked"),
        "status": ([receiver.url], "answer 500"),
        "format": ([receiver.url, "--format", "nonsense"], "nonsense"),
    }[what]
    result = run(host, "trigger", *arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "\x1b" not in result.output


def test_life_of_a_standing_endpoint(host: Flask, state: State, receiver: Receiver) -> None:
    made = run(host, "endpoints", "create", receiver.url, "--event", "job.failure", "--header", "X-Key: k: v",
               "--description", "for the operators")  # fmt: skip
    assert made.exit_code == 0, made.output
    endpoint_id, shown, *_ = made.output.split()
    secret = made.output.split()[2]
    assert shown == "secret"
    enqueue(state, f"ep{state.namespace}_all", "tests.jobs.fail", "dry")
    run(host, "worker", "--burst")
    (received,) = receiver.received
    verify(received.body, received.headers, secret)
    assert received.headers["X-Key"] == "k: v"

    listed = run(host, "endpoints", "list").output
    assert endpoint_id in listed
    assert "job.failure" in listed
    (reported,) = json.loads(run(host, "endpoints", "list", "--json").output)
    assert (reported["id"], reported["events"], reported["enabled"]) == (endpoint_id, ["job.failure"], True)
    assert reported["description"] == "for the operators"
    assert reported["url"].startswith(receiver.url.rpartition("/")[0])
    for text in (secret, "k: v"):
        assert text not in listed
        assert text not in json.dumps(reported)
    rotated = run(host, "endpoints", "rotate", endpoint_id, "--grace-hours", "1")
    assert rotated.exit_code == 0
    assert "whsec_" in rotated.output
    assert run(host, "endpoints", "disable", endpoint_id).exit_code == 0
    assert "disabled (operator)" in run(host, "endpoints", "list").output
    assert run(host, "endpoints", "enable", endpoint_id).exit_code == 0
    assert run(host, "endpoints", "delete", endpoint_id, "--yes").exit_code == 0
    assert list_endpoints(state.database).items == ()
    assert run(host, "endpoints", "delete", endpoint_id, "--yes").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["https://user:pw@example.com/"], "url: The URL must not contain a user", id="userinfo"),
        pytest.param(["https://example.com/", "--event", "Nonsense"], "events: Unknown event", id="event"),
        pytest.param(["https://example.com/", "--header", "no colon"], "not a header", id="header"),
        pytest.param(["https://example.com/", "--header", "Host: x"], "Host", id="refused-header"),
        pytest.param(
            ["https://example.com/", "--header", "X: 1", "--header", "X: 2"],
            "more than once",
            id="header-twice",
        ),
        pytest.param(["https://example.com/", "--format", "xml"], "Unknown format", id="format"),
        pytest.param(["https://example.com/", "--timeout", "1000"], "at most", id="timeout"),
    ],
)
def test_bad_endpoints_are_refused(host: Flask, state: State, arguments: list[str], said: str) -> None:
    result = run(host, "endpoints", "create", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert list_endpoints(state.database).items == ()


def test_resend_recover_and_cancel(host: Flask, state: State, receiver: Receiver) -> None:
    answers = iter([400])
    receiver.respond = lambda received: next(answers, 204)
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    run(host, "worker", "--burst")
    (delivery,) = deliveries(state)
    assert delivery.status == "exhausted"

    assert run(host, "recover").exit_code == 2  # says what is missing
    assert run(host, "recover", "--status", "lost").exit_code == 2
    assert run(host, "recover", "--since", "yesterday").exit_code == 2
    assert "0 deliveries" in run(host, "recover", "--until", "1h").output
    assert "1 deliveries are due" in run(host, "recover", "--since", "1h", "--status", "exhausted").output
    assert "1 deliveries canceled" in run(host, "cancel", "--all").output
    assert deliveries(state)[0].status == "canceled"
    assert run(host, "resend", "dlv_unknown").exit_code == 1
    assert run(host, "resend", delivery.id).output == "Due now.\n"
    run(host, "worker", "--burst")
    assert deliveries(state)[0].status == "succeeded"
    assert [attempt.trigger for attempt in attempts(state)] == ["scheduled", "manual"]
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 1


def test_pause_resume_prune_rekey(host: Flask, state: State, receiver: Receiver) -> None:
    enqueue(state, add_endpoint(state, receiver.url), "tests.jobs.add", 1, 2)
    assert run(host, "pause").exit_code == 0
    run(host, "worker", "--burst")
    assert receiver.received == []
    assert run(host, "resume").exit_code == 0
    run(host, "worker", "--burst")
    assert len(receiver.received) == 1
    assert "Deleted 0 deliveries" in run(host, "prune", "--days", "1").output
    assert "1 values" in run(host, "rekey").output


def test_reconcile_reports_what_no_callback_reported(
    host: Flask, state: State, redis_client: redis.Redis
) -> None:
    endpoint_id = add_endpoint(state, "http://127.0.0.1:9/hook")
    enqueue(state, endpoint_id, "tests.jobs.add", 1, 2)
    redis_client.delete(state.outbox.key)  # as a Redis that was trimmed
    time.sleep(CALLBACK_GRACE.total_seconds())
    result = run(host, "reconcile")
    assert result.exit_code == 0, result.output
    assert "job.success: 1" in result.output
    assert len(deliveries(state)) == 1
    assert dispatchers.take_reconcile_lease(state.database, "somebody", 60)
    assert run(host, "reconcile").exit_code == 1


@pytest.fixture
def listener() -> Iterator[tuple[Process, str]]:
    arguments = ["python", "-m", "flask", "rq-webhooks", "listen", "--port", "0", "--secret", "s3cret"]
    with Process(*arguments) as process:
        process.wait_for_output("Listening on ")
        match = re.search(r"http://\S+", process.output)
        assert match is not None
        yield process, match[0]


def test_listen_prints_and_verifies(listener: tuple[Process, str]) -> None:
    process, url = listener
    body = json.dumps({"event": "webhook.ping", "text": "\x1b[31m"}).encode()
    headers = {"webhook-id": "evt_1", "webhook-timestamp": str(int(time.time()))} | signature_headers(
        ["s3cret"], event_id="evt_1", timestamp=int(time.time()), body=body,
        header_prefix="X-Webhook", iso_timestamp=False,
    )  # fmt: skip
    assert requests.post(url, data=body, headers=headers, timeout=5).status_code == 200
    process.wait_for_output("  verified (v1)")
    assert requests.post(url + "x?\x1b", data=body + b" ", headers=headers, timeout=5).status_code == 200
    process.wait_for_output("NOT VERIFIED")
    assert requests.post(url, data=b"\x1b plain", timeout=5).status_code == 200
    process.wait_for_output("plain")
    assert "\x1b" not in process.output
    assert "s3cret" not in process.output
    process.kill(signal.SIGINT)
    assert process.wait(10) == 0


# -- what commands say where something is missing -----------------------------------------------------------


@contextmanager
def unprivileged(postgres_url: str, *, made: bool = False) -> Iterator[Flask]:
    """Give a host whose database user may do nothing; with *made*, in a database that has our tables."""
    role = f"app_{uuid.uuid4().hex[:8]}"
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(sa.text("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
    if made:
        database = Database(postgres_url)
        database.create_tables()
        database.dispose()
    app = Flask("host")
    app.config.update(
        SECRET_KEY="a key for tests only",
        RQ_WEBHOOKS_DATABASE_URI=sa.make_url(postgres_url).set(username=role).render_as_string(False),
        RQ_WEBHOOKS_REDIS_URL="redis://127.0.0.1:1/0",
    )
    RQWebhooks(app)
    try:
        yield app
    finally:
        get_state(app).database.dispose()
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP ROLE {role}"))
        admin.dispose()


def one_sentence(result: Result, *said: str) -> None:
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert len(result.output.strip().splitlines()) == 1, result.output
    assert "Traceback" not in result.output
    for words in said:
        assert words in result.output, result.output


@pytest.mark.parametrize("command", [["init-db"], ["worker", "--burst"], ["endpoints", "list"], ["pause"]])
def test_without_rights_every_command_names_the_grant(postgres: PostgresHandle, command: list[str]) -> None:
    with unprivileged(postgres.new_database(), made=command != ["init-db"]) as app:
        one_sentence(run(app, *command), "permission denied", "GRANT", "SCHEMA public TO app_")


@pytest.mark.parametrize(
    "command", [["init-db"], ["worker", "--burst"], ["endpoints", "list"], ["recover", "--all"], ["resume"],
                ["resend", "dlv_1"], ["prune"], ["rekey"], ["reconcile"]]
)  # fmt: skip
def test_without_a_database_every_command_says_which_setting(redis_url: str, command: list[str]) -> None:
    app = Flask("host")
    app.config.update(
        SECRET_KEY="a key for tests only",
        RQ_WEBHOOKS_DATABASE_URI=f"postgresql+psycopg://u:hidden@127.0.0.1:{free_port()}/db",
        RQ_WEBHOOKS_REDIS_URL=redis_url,
    )
    RQWebhooks(app)
    result = run(app, *command)
    get_state(app).database.dispose()
    one_sentence(result, "cannot be used now", "start the database, or correct RQ_WEBHOOKS_DATABASE_URI")
    assert "hidden" not in result.output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "postgres://u:hidden@localhost/db",
            "is not usable (no such dialect); write it as postgresql+psycopg://",
        ),
        ("postgresql+psycopg2cffi://u:hidden@localhost/db", "needs the driver 'psycopg2cffi'"),
        ("//hidden@localhost/db", "is not usable (ArgumentError)"),
    ],
    ids=["dialect", "driver", "malformed"],
)
def test_unusable_urls_are_named(redis_url: str, url: str, said: str) -> None:
    app = Flask("host")
    app.config.update(
        SECRET_KEY="a key for tests only", RQ_WEBHOOKS_DATABASE_URI=url, RQ_WEBHOOKS_REDIS_URL=redis_url
    )
    RQWebhooks(app)
    result = run(app, "init-db")
    one_sentence(result, "RQ_WEBHOOKS_DATABASE_URI", said)
    assert "hidden" not in result.output


def test_without_redis_the_command_says_which_setting(sqlite_url: str) -> None:
    app = Flask("host")
    app.config.update(
        SECRET_KEY="a key for tests only",
        RQ_WEBHOOKS_DATABASE_URI=sqlite_url,
        RQ_WEBHOOKS_REDIS_URL="redis://127.0.0.1:1/0",
    )
    RQWebhooks(app)
    get_state(app).database.create_tables()
    result = run(app, "reconcile")
    get_state(app).database.dispose()
    one_sentence(result, "does not answer", "start it, or correct RQ_WEBHOOKS_REDIS_URL")


def test_listen_on_a_taken_port_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["listen", "--port", str(port)])
    one_sentence(result, f"Port {port} on 127.0.0.1 is in use by another process", "--port")


@pytest.mark.parametrize("address", ["192.0.2.1", "no-such-host.invalid"])
def test_listen_on_an_address_of_somebody_else_says_so(address: str) -> None:
    one_sentence(CliRunner().invoke(cli, ["listen", "--host", address]), "not an address of this machine")


def test_control_characters_reach_no_terminal(host: Flask, state: State) -> None:
    hostile = "a\x1b[2J\x9b1m\u202eb\r\nc"
    values = {"description": hostile, "events": ("own.type",), "format": "job"}
    endpoint = NewEndpoint(url="https://a.example/", host="a.example\x1b]0;x\x07", kind="standing", **values)
    create_standing(state.database, state.cipher, endpoint, namespace=state.namespace)
    listed = run(host, "endpoints", "list").output
    assert len(listed.splitlines()) == 1
    assert listed.strip().isprintable()
    assert "\\x1b[2J" in listed
    (shown,) = json.loads(run(host, "endpoints", "list", "--json").output)
    assert shown["description"] == hostile  # programs get what is stored
    host.add_url_rule("/a\x1b[2J", "view\x9b", lambda: "")
    for arguments in (
        ("routes", "--all"),
        ("routes", "--ignore", hostile),
        ("trigger", "https://a.example/", "--format", hostile),
        ("resend", hostile),
        ("recover", "--since", hostile),
        ("endpoints", "create", "https://a.example/", "--event", hostile),
        ("endpoints", "enable", hostile),
        (hostile,),
    ):
        output = run(host, *arguments).output
        assert "\\x1b" in output, arguments
        assert output.replace("\n", "").isprintable(), arguments
