"""Endpoints and watches: what was promised to whom."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from datetime import UTC, datetime

import pytest

from flask_rq_webhooks.errors import StorageUnavailableError
from flask_rq_webhooks.storage.database import Database
from flask_rq_webhooks.storage.endpoints import NewEndpoint, confirm, register, waiting_for_host
from flask_rq_webhooks.storage.models import Delivery, Endpoint, Secret, Watch
from flask_rq_webhooks.storage.standing_endpoints import (
    create_standing,
    delete_standing_part,
    disable_standing,
    enable_standing,
    rotate_secret,
    update_standing,
)
from tests.storage_rows import (
    CIPHER,
    NAMESPACE,
    claim,
    deliver_to,
    new_endpoint,
    occurrence,
    publish,
    row,
    rows,
    set_values,
    statements_of,
)


def watches(database: Database) -> dict[str, str]:
    return {watch.job_id: watch.status for watch in rows(database, Watch)}


def test_register_stores_everything_with_secrets_encrypted(database: Database) -> None:
    endpoint = NewEndpoint(
        url="https://a.example/hook", host="a.example", headers={"X-Own": "hush"}, secret="whsec_1",
        events=("job.success", "job.retrying"), format="task", sign_payload=True, reference="ref",
        runid="run", timeout_s=3.5, max_attempts=4,
    )  # fmt: skip
    now = datetime.now(UTC)
    endpoint_id = register(database, CIPHER, endpoint, namespace=NAMESPACE, reserved_job_id="job-1", now=now)
    stored, secret, watch = row(database, Endpoint), row(database, Secret), row(database, Watch)
    assert endpoint_id.startswith(f"ep{NAMESPACE}_")
    assert (stored.id, stored.kind, stored.url, stored.host) == (
        endpoint_id,
        "job",
        endpoint.url,
        "a.example",
    )
    assert json.loads(CIPHER.decrypt(stored.headers)) == {"X-Own": "hush"}
    assert json.loads(stored.events) == ["job.success", "job.retrying"]
    assert (stored.format, stored.sign_payload, stored.reference, stored.runid) == (
        "task",
        True,
        "ref",
        "run",
    )
    assert (stored.timeout_s, stored.max_attempts, stored.enabled, stored.created_at) == (3.5, 4, True, now)
    assert (secret.endpoint_id, CIPHER.decrypt(secret.secret), secret.expires_at) == (
        endpoint_id,
        "whsec_1",
        None,
    )
    assert (watch.endpoint_id, watch.job_id, watch.status, watch.missing_passes) == (
        endpoint_id, "job-1", "reserved", 0,
    )  # fmt: skip
    for hidden in ("hush", "whsec_1"):
        assert hidden not in repr(endpoint)


def test_register_without_secret_and_job(database: Database) -> None:
    new_endpoint(database)
    stored = row(database, Endpoint)
    assert (stored.headers, stored.events) == (None, None)
    assert rows(database, Secret) == rows(database, Watch) == []


def test_register_is_one_statement_on_postgresql_and_one_transaction_on_sqlite(database: Database) -> None:
    new_endpoint(database)  # the first connection asks more
    with statements_of(database) as said:
        new_endpoint(database, job_id="job-1", secret="s")
    statements = [statement.split()[0] for statement in said]
    assert statements == (["BEGIN", "INSERT", "INSERT", "INSERT"] if database.is_sqlite else ["WITH"])
    assert len(rows(database, Watch)) == 1


def test_confirm_opens_reserves_and_closes(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="first")
    for _ in range(2):
        confirm(
            database,
            endpoint_id,
            existing=["first", "second"],
            unseen=["third", "second"],
            reserved_job_id="first",
        )
        assert watches(database) == {"first": "open", "second": "open", "third": "reserved"}
    assert row(database, Watch, Watch.job_id == "first").confirmed_at is not None
    confirm(database, endpoint_id, existing=["third"], unseen=[], reserved_job_id="first")
    assert watches(database)["third"] == "open"
    unused = new_endpoint(database, job_id="unused")
    confirm(database, unused, existing=["own-id"], unseen=[], reserved_job_id="unused")
    assert (watches(database)["unused"], watches(database)["own-id"]) == ("closed", "open")


def test_confirm_never_moves_a_watch_back(database: Database) -> None:
    endpoint_id = new_endpoint(database, job_id="job-1")
    publish(database, occurrence("job-1"))
    confirm(database, endpoint_id, existing=["job-1"], unseen=[], reserved_job_id="job-1")
    assert watches(database) == {"job-1": "settled"}
    confirm(database, endpoint_id, existing=[], unseen=[], reserved_job_id="job-1")
    assert watches(database) == {"job-1": "settled"}
    closed = new_endpoint(database, job_id="job-2")
    for existing in ([], ["job-2"]):
        confirm(database, closed, existing=existing, unseen=[], reserved_job_id="job-2")
    assert watches(database)["job-2"] == "closed"


def test_confirm_of_an_endpoint_that_is_gone_is_logged(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        confirm(database, "epforeign_1", existing=["job-1"], unseen=[], reserved_job_id=None)
    assert "epforeign_1" in caplog.text
    assert watches(database) == {}


def test_a_host_that_holds_the_write_lock_delays_confirm_only_as_long_as_allowed(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    database.create_tables()
    endpoint_id = new_endpoint(database, job_id="job-1")
    host = sqlite3.connect(database.url.database or "", isolation_level=None)
    host.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="locked"):
        confirm(
            database, endpoint_id, existing=["job-1"], unseen=[], reserved_job_id="job-1", busy_timeout_s=0.1
        )
    assert time.monotonic() - started < 1
    # Afterwards the connection waits as long as ever.
    finished: list[float] = []

    def wait() -> None:
        new_endpoint(database, job_id="job-2")
        finished.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.4)
    released = time.monotonic()
    host.execute("COMMIT")
    thread.join()
    assert finished[0] >= released
    confirm(database, endpoint_id, existing=["job-1"], unseen=[], reserved_job_id="job-1", busy_timeout_s=0.1)
    assert watches(database)["job-1"] == "open"
    host.close()
    database.dispose()


def test_what_waits_for_a_host(database: Database) -> None:
    deliver_to(database, "a.example", 5)
    deliver_to(database, "b.example", 1)
    claim(database, limit=2)
    assert waiting_for_host(database, "a.example") == 5
    assert waiting_for_host(database, "a.example", at_most=3) == 3
    assert waiting_for_host(database, "c.example") == 0


def standing(database: Database, **values: object) -> str:
    endpoint = NewEndpoint(kind="standing", url="https://a.example/", host="a.example", **values)  # type: ignore[arg-type]
    return create_standing(database, CIPHER, endpoint, namespace=NAMESPACE)


def test_standing_endpoints_are_created_and_changed(database: Database) -> None:
    with pytest.raises(ValueError, match="standing"):
        create_standing(database, CIPHER, NewEndpoint(url="u", host="h"), namespace=NAMESPACE)
    endpoint_id = standing(database, description="first")
    deliver_to(database, "other.example")
    publish(database, occurrence("job-1"))
    changes = {
        "url": "https://b.example/", "host": "b.example", "headers": {"A": "b"}, "events": ("*",),
        "description": None,
    }  # fmt: skip
    assert update_standing(database, CIPHER, endpoint_id, changes)
    stored = row(database, Endpoint, Endpoint.id == endpoint_id)
    assert (stored.url, stored.host, stored.description) == ("https://b.example/", "b.example", None)
    assert json.loads(CIPHER.decrypt(stored.headers)) == {"A": "b"}
    assert json.loads(stored.events) == ["*"]
    hosts = {one.host for one in rows(database, Delivery, Delivery.endpoint_id == endpoint_id)}
    assert hosts == {"b.example"}, "what waits goes to the new URL"
    assert not update_standing(database, CIPHER, "ep_unknown", {"description": "x"})
    assert not update_standing(database, CIPHER, new_endpoint(database), {"description": "job-bound"})
    with pytest.raises(ValueError, match="together"):
        update_standing(database, CIPHER, endpoint_id, {"url": "https://c.example/"})
    with pytest.raises(ValueError, match="kind"):
        update_standing(database, CIPHER, endpoint_id, {"kind": "job"})


def test_rotation_keeps_the_old_secret_for_a_while(database: Database) -> None:
    endpoint_id = standing(database, secret="old")
    assert rotate_secret(database, CIPHER, endpoint_id, "new", grace_s=60)
    stored = {CIPHER.decrypt(one.secret): one for one in rows(database, Secret)}
    assert stored["new"].expires_at is None
    assert 55 < (stored["old"].expires_at - datetime.now(UTC)).total_seconds() <= 60.5
    set_values(database, Secret, stored["old"].id, expires_at=datetime.now(UTC))
    assert rotate_secret(database, CIPHER, endpoint_id, "newest")
    assert {CIPHER.decrypt(one.secret) for one in rows(database, Secret)} == {"new", "newest"}
    assert not rotate_secret(database, CIPHER, new_endpoint(database), "x"), "job-bound ones do not rotate"


def test_disabled_enabled_deleted(database: Database) -> None:
    endpoint_id = standing(database, secret="s")
    publish(database, *[occurrence(f"job-{number}") for number in range(5)])
    assert disable_standing(database, endpoint_id)
    stored = row(database, Endpoint)
    assert (stored.enabled, stored.disabled_reason) == (False, "operator")
    assert enable_standing(database, endpoint_id)
    assert row(database, Endpoint).enabled
    bound = new_endpoint(database)
    for change in (disable_standing, enable_standing, delete_standing_part):
        assert not change(database, "ep_unknown")
        assert not change(database, bound)
    parts = [delete_standing_part(database, endpoint_id, at_most=2) for _ in range(3)]
    assert parts == [False, False, True]  # five deliveries, two at once
    assert rows(database, Delivery) == rows(database, Secret) == []
    assert row(database, Endpoint).id == bound
