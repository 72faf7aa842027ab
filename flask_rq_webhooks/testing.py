"""For the tests of host apps: deliver every webhook within the test, to an in-memory receiver.

This is the shortest way from an ended job to a received webhook: one thread, no process, no network, no
waiting. It runs the steps of a dispatcher with a dispatcher's own parts, so what a test sees is what clients
get: the same payloads, headers and signatures, and the same rows. It does not depend on pytest.

::

    def test_client_gets_a_webhook(app, client):
        client.post("/build", json={"webhook_url": "https://client.example/hook", "webhook_secret": "s3cret"})
        (webhook,) = deliver_all(app)
        assert webhook.verify("s3cret").json["event"] == "job.success"

The queue may be ``is_async=False`` on fakeredis, or be processed by a ``SimpleWorker`` before
:func:`deliver_all`; pass the same client to ``RQWebhooks(db=db, redis=...)``. An in-memory SQLite URL works
unchanged: our tables then live in an in-memory database of their own.

:func:`observe_routes` reports which routes enqueued jobs without a webhook while a test suite ran.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

from flask import Flask, current_app, has_request_context, request, request_started

from .accept.request_fields import asked_in_request
from .dispatch.dispatcher import reconcile_now
from .dispatch.host_limits import RateLimiter
from .dispatch.http import AttemptRequest, AttemptResult
from .dispatch.pubsub import Notices
from .dispatch.recorder import Recorder
from .dispatch.sender import Sender
from .observe.ingest import Ingest
from .observe.publisher import Publisher
from .queue.enqueue_observer import SeenJob, observe
from .receiver import VerifiedWebhook, verify
from .state import State, get_state
from .storage.deliveries import make_all_due
from .storage.models import new_id

__all__ = [
    "InMemoryReceiver",
    "ObservedJob",
    "ObservedRoutes",
    "ReceivedWebhook",
    "deliver_all",
    "observe_routes",
]

#: Error codes a receiver may answer with instead of a status: network failures.
NETWORK_ERRORS = frozenset({"blocked", "connect", "dns", "reset", "timeout", "tls"})


@dataclass(frozen=True, slots=True)
class ReceivedWebhook:
    """One request as the client would have seen it.

    :param headers: as sent, in order; :meth:`header` finds one by its name in any case.
    :param body: the signed bytes.
    """

    url: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """Return a header by its name in any case; ``None`` if it was not sent."""
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), None)

    def verify(self, secret: str, **options: Any) -> VerifiedWebhook:
        """Verify the signature as a receiver would.

        :param options: see :func:`flask_rq_webhooks.receiver.verify`.
        :raises SignatureError: when it is not signed with *secret*.
        """
        return verify(self.body, self.headers, secret, **options)


#: A status; a status with headers and body; one of :data:`NETWORK_ERRORS`; or a function that returns one.
Answer = int | str | tuple[int, Mapping[str, str], bytes] | Callable[[ReceivedWebhook], Any]


class InMemoryReceiver:
    """Stand in for every URL: keep what is sent, and respond as configured.

    ``InMemoryReceiver(500, "timeout", 204)`` answers the first request with 500, lets the second time out,
    and accepts the third and all others; without arguments, it accepts everything. A function is called with
    the :class:`ReceivedWebhook` and returns the answer.

    :param answers: one per request, the last for all that follow.
    :raises ValueError: for an unknown network error.
    """

    def __init__(self, *answers: Answer) -> None:
        for answer in answers:
            if isinstance(answer, str):
                _checked_error(answer)
        self._answers = answers or (204,)
        self._lock = threading.Lock()
        #: Everything that was sent, in order.
        self.received: list[ReceivedWebhook] = []

    def submit(self, request: AttemptRequest) -> Future[AttemptResult]:
        """Accept a request and answer it at once; this is the dispatcher's side of the receiver."""
        started_at = datetime.now(UTC)
        webhook = ReceivedWebhook(request.url, dict(request.headers), request.body)
        with self._lock:
            answer = self._answers[min(len(self.received), len(self._answers) - 1)]
            self.received.append(webhook)
        future: Future[AttemptResult] = Future()
        future.set_result(_result(answer(webhook) if callable(answer) else answer, started_at))
        return future

    def close(self, *, wait: bool) -> None:
        """Do nothing: there is nothing to close."""


def deliver_all(
    app: Flask, receiver: InMemoryReceiver | None = None, *, retries: bool = True
) -> list[ReceivedWebhook]:
    """Deliver the events of the app's jobs, and return what was received by this call, in order.

    Reads the outbox, looks once for endings that no callback reported (canceled and deleted jobs, for
    instance; a missing job is reported as lost by the second call), and sends.

    :param app: an app with :class:`~flask_rq_webhooks.RQWebhooks` initialised.
    :param receiver: gets everything that is sent; by default, one that accepts everything.
    :param retries: also make the attempts that are due later, at once; otherwise their deliveries stay
        ``pending``.
    :raises StorageUnavailableError: when SQL cannot be used.
    :raises redis.RedisError: when Redis cannot be used.
    """
    receiver = receiver or InMemoryReceiver()
    already = len(receiver.received)
    state = get_state(app)
    consumer = new_id("tst")
    ingest = Ingest(state, consumer=consumer, publisher=Publisher(state))
    while not ingest.is_idle():
        ingest.run_once(block_ms=1)
    reconcile_now(state)
    notices = Notices.from_settings(state.settings)
    try:
        _send_all(state, receiver, notices, consumer, retries=retries)
    finally:
        if notices is not None:
            notices.close()
    return receiver.received[already:]


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """One job that a view enqueued.

    :param view: Flask's endpoint name.
    :param rule: the route; with *method*, the one that was called.
    :param func: dotted name of the job's function.
    :param webhook: ``"decorator"``, ``"helper"`` (``enqueue_with_webhook``, ``watch``), ``"missing"``,
        or ``"unattached"``: the view is decorated, but its queue is a plain ``rq.Queue``, which carries a
        webhook only with ``instrument_rq=True``.
    :param made_elsewhere: whether it was made by ``Job.create`` or fetched: a decorator alone does not help
        such a job, :meth:`~flask_rq_webhooks.RQWebhooks.watch` does.
    """

    view: str
    rule: str
    method: str
    func: str
    webhook: str
    made_elsewhere: bool = False


@dataclass(slots=True)
class ObservedRoutes:
    """What :func:`observe_routes` has seen so far."""

    _seen: list[tuple[SeenJob, tuple[str, str, str], bool, set[str]]] = field(
        default_factory=list, repr=False
    )
    _called: dict[tuple[str, str, str], None] = field(default_factory=dict, init=False, repr=False)

    @property
    def jobs(self) -> list[ObservedJob]:
        """Return the jobs that views enqueued, in order."""
        return [
            ObservedJob(*where, seen.func, _webhook_of(seen, decorated, watched), seen.made_elsewhere)
            for seen, where, decorated, watched in self._seen
        ]

    @property
    def missing(self) -> list[str]:
        """Return the names of the views that enqueued a job that cannot have a webhook, sorted."""
        return sorted({job.view for job in self.jobs if job.webhook in ("missing", "unattached")})

    def save(self, path: str | PathLike[str]) -> None:
        """Write what was seen as JSON, for ``flask rq-webhooks routes --observed``.

        Routes that were called and enqueued nothing are included, with ``"webhook": "none"``.
        """
        unique = {job: None for job in self.jobs}
        enqueuing = {(job.view, job.rule, job.method) for job in unique}
        unique |= {ObservedJob(*where, "", "none"): None for where in self._called if where not in enqueuing}
        Path(path).write_text(json.dumps([asdict(job) for job in unique], indent=1) + "\n")


@contextmanager
def observe_routes(app: Flask) -> Iterator[ObservedRoutes]:
    """Observe which views of *app* enqueue jobs, and whether these jobs could have a webhook.

    ::

        @pytest.fixture(scope="session", autouse=True)
        def observed(app):
            with observe_routes(app) as routes:
                yield
            assert routes.missing == []

    Only what runs is seen, whether or not a request asks for a webhook, so the result is as good as the tests
    that call the routes. This sees through every wrapper of RQ's queues. Jobs enqueued outside of requests do
    not count, nor do those of threads that a view starts.
    """
    routes = ObservedRoutes()

    def here() -> tuple[str, str, str]:
        return request.endpoint or "", str(request.url_rule or ""), request.method

    def note(seen: SeenJob) -> None:
        if has_request_context() and current_app._get_current_object() is app:  # type: ignore[attr-defined]
            asked = asked_in_request()
            assert asked is not None  # noqa: S101  (in a request)
            routes._seen.append((seen, here(), asked.decorated, asked.watched))

    def note_call(sender: Flask, **what: Any) -> None:
        routes._called[here()] = None

    with observe(note), request_started.connected_to(note_call, app):
        yield routes


def _webhook_of(seen: SeenJob, decorated: bool, watched: set[str]) -> str:
    if seen.job_id in watched:
        return "helper"
    if seen.made_elsewhere:
        return "missing"
    if seen.by_helper:
        return "helper"
    if not decorated:
        return "missing"
    return "decorator" if seen.attachable else "unattached"


def _send_all(
    state: State, receiver: InMemoryReceiver, notices: Notices | None, dispatcher_id: str, *, retries: bool
) -> None:
    recorder = Recorder(state, notices=notices, dispatcher_id=dispatcher_id)
    sender = Sender(
        state,
        transport=receiver,
        # No rate limit: a test would wait for the next minute.
        limiter=RateLimiter(state.redis, 0),
        recorder=recorder,
        concurrency=state.settings.concurrency,
    )
    while True:
        if retries:
            make_all_due(state.database)
        sent = len(receiver.received)
        sender.wake()
        while sender.advance() <= 0 or sender.idle_since is None:
            recorder.record()
            sender.wake()
        # What cannot be sent at all (a wrong key) is also waiting: going on would never end.
        if not retries or len(receiver.received) == sent:
            return


def _result(answer: Any, started_at: datetime) -> AttemptResult:
    if isinstance(answer, str):
        return AttemptResult(
            started_at=started_at,
            duration_ms=0.0,
            error_code=_checked_error(answer),
            error_detail=f"{answer} (set by the test)",
        )
    status, headers, body = answer if isinstance(answer, tuple) else (answer, {}, b"")
    kept = {name.lower(): value for name, value in headers.items()}
    return AttemptResult(
        started_at=started_at,
        duration_ms=0.0,
        status_code=status,
        error_code="redirect" if 300 <= status < 400 else None,
        response_headers=kept,
        response_body=body,
        retry_after=kept.get("retry-after"),
    )


def _checked_error(answer: str) -> str:
    if answer not in NETWORK_ERRORS:
        raise ValueError(f"{answer!r} is not a network error; known are {', '.join(sorted(NETWORK_ERRORS))}.")
    return answer
