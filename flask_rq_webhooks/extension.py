"""The extension object: the host app imports it, and everything is built here once per app.

It holds the host's hooks and nothing that belongs to one app: settings, connections and policies are in
:class:`~flask_rq_webhooks.state.State`, one per app.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, overload

import click
from flask import Flask, has_request_context, request

from . import tracing
from .accept import decorator, register, tenants
from .config import load_settings
from .errors import ConfigurationError, InvalidWebhookError, StorageUnavailableError
from .observe.publisher import Publisher
from .protocol.events import SOURCE_APPLICATION, Occurrence, is_application_type
from .protocol.json_safe import to_json_safe
from .protocol.payloads import FORMATS, PayloadFormat, custom_format
from .queue import job_callbacks
from .state import EXTENSION_NAME, Authorize, ErrorEnvelope, Scrub, State, Tenant, get_state
from .storage.events import IngestItem
from .storage.models import copy_tables
from .web import api, endpoint_pages, job_status, page_frame, pages

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy
    from redis import Redis
    from rq import Queue
    from rq.job import Job

View = TypeVar("View", bound=Callable[..., Any])
Function = TypeVar("Function", bound=Callable[..., Any])


class RQWebhooks:
    """Send signed webhooks to API clients when their RQ jobs end.

    ::

        db = SQLAlchemy()
        webhooks = RQWebhooks(db=db)
        webhooks.init_app(app)

        @app.post("/build")
        @webhooks.accepts_webhook
        def build():
            job = Queue("default", connection=redis).enqueue(build_rq)
            return {"job_id": job.id}

    :param app: an app to initialise immediately.
    :param db: the host's Flask-SQLAlchemy object: our tables go into its database, through an engine of
        our own, and into its metadata for Flask-Migrate. Without it, ``RQ_WEBHOOKS_DATABASE_URI`` or
        ``SQLALCHEMY_DATABASE_URI`` says where they are.
    :param redis: a client, or a function that returns one, instead of ``RQ_WEBHOOKS_REDIS_URL``
        (TLS, Sentinel).
    :param instrument_rq: let plain ``rq.Queue`` objects inside decorated views carry the webhook, so that
        no enqueuing code changes.
    """

    def __init__(
        self,
        app: Flask | None = None,
        db: SQLAlchemy | None = None,
        *,
        redis: Redis | Callable[[], Redis] | None = None,
        instrument_rq: bool = False,
    ) -> None:
        self.db = db
        self.authorize_function: Authorize | None = None
        self.scrub_function: Scrub | None = None
        self.error_envelope_function: ErrorEnvelope | None = None
        self.tenant_function: Tenant | None = None
        self.formats: dict[str, PayloadFormat] = dict(FORMATS)
        self._redis = redis
        self._instrument_rq = instrument_rq
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Initialise *app*: check its settings, mount the blueprint, build its state.

        Opens no connection, so it may come before ``db.init_app(app)``.

        :raises ConfigurationError: for a bad setting, or when *app* was initialised before.
        """
        if EXTENSION_NAME in app.extensions:
            raise ConfigurationError(
                f"flask_rq_webhooks is already initialised for the app {app.name!r}; call init_app once, or "
                "pass the app to RQWebhooks() and leave init_app out."
            )
        settings = load_settings(app.config, has_redis=self._redis is not None)
        if settings.format not in self.formats:
            raise ConfigurationError(
                f"RQ_WEBHOOKS_FORMAT is {settings.format!r}; known formats are {sorted(self.formats)}. "
                "Register your own with @webhooks.payload_format before init_app."
            )
        db = self.db if self.db is not None else app.extensions.get("sqlalchemy")
        state = State(app, settings, self, db=db, redis=self._redis)
        if db is not None and settings.database_uri is None:
            copy_tables(db.metadatas, settings.bind_key)
        app.extensions[EXTENSION_NAME] = state
        blueprint = api.create_blueprint(state)
        job_status.add_to(blueprint)
        if settings.dashboard:
            for shown in page_frame.dashboard_and_portal(blueprint, state):
                pages.add_pages(shown)
                endpoint_pages.add_pages(shown)
        app.register_blueprint(blueprint)
        # `flask rq-webhooks` finds its entry point first, even if the app cannot be loaded; this is for
        # callers that ask the app itself, such as app.test_cli_runner().
        app.cli.add_command(_Commands("rq-webhooks"))
        app.before_request(decorator.take_fields_before_parsers)
        app.register_error_handler(InvalidWebhookError, decorator.answer_invalid)
        app.register_error_handler(StorageUnavailableError, decorator.answer_unavailable)
        if settings.attach == "all":
            job_callbacks.set_default_attachment(decorator.attachment_for_current_app)
            app.teardown_appcontext(decorator.watch_created)
        if self._instrument_rq:
            job_callbacks.instrument()

    # -- routes ---------------------------------------------------------------------------------------

    @overload
    def accepts_webhook(self, view: View, /) -> View: ...

    @overload
    def accepts_webhook(
        self,
        /,
        *,
        events: Sequence[str] | None = None,
        scope: str = "job",
        runid: str | None = "runid",
        jobs: decorator.Jobs | None = None,
        fields: str = "all",
        hide: str = "all",
    ) -> Callable[[View], View]: ...

    def accepts_webhook(
        self,
        view: View | None = None,
        /,
        *,
        events: Sequence[str] | None = None,
        scope: str = "job",
        runid: str | None = "runid",
        jobs: decorator.Jobs | None = None,
        fields: str = "all",
        hide: str = "all",
    ) -> View | Callable[[View], View]:
        """Let the clients of a view ask for a webhook for the jobs it enqueues.

        Place it below decorators that check who is calling, and above those that parse the body.

        :param events: event types sent if the request names none; all terminal types by default.
        :param scope: ``"job"``, or ``"tree"`` for one event about all jobs of the request and their children.
        :param runid: name of the view argument that holds the host's run id; ``None`` if no argument does,
            neither of the view nor of the jobs, but only ``job.meta["runid"]``.
        :param jobs: the functions whose jobs are reported, by name (dotted, or the last part) or themselves;
            or a function that takes a dotted name and returns whether to report it. Every job by default.
        :param fields: ``"headers"`` for a view that reads the body as a stream: the body is not touched, and
            fields are taken from headers and the query string only.
        :param hide: ``"parsed"`` leaves the raw bytes of the body as they are; by default our fields are
            removed from them, too.
        :raises ConfigurationError: for an unknown value of an option.
        """

        def decorate(function: View) -> View:
            return decorator.accepts_webhook(
                function, events=events, scope=scope, runid=runid, jobs=jobs, fields=fields, hide=hide
            )

        return decorate if view is None else decorate(view)

    def enqueue_with_webhook(
        self,
        queue: Queue,
        func: Callable[..., Any] | str,
        args: Sequence[Any] = (),
        *,
        timeout: int | str | None = None,
        job_timeout: int | str | None = None,
        runid: str | None = None,
        payload: Mapping[str, Any] | None = None,
        **enqueue_options: Any,
    ) -> Job:
        """Enqueue one job and report it to the webhook that *payload* or the decorated request asks for.

        :param queue: any RQ queue; it need be neither ours nor instrumented.
        :param payload: mapping with the webhook fields; without it, those of the decorated request.
        :param timeout: timeout of the job, as in ``rq.Queue.enqueue_call``.
        :param job_timeout: the same, under the name that ``rq.Queue.enqueue`` uses.
        :param enqueue_options: further arguments of ``rq.Queue.enqueue_call``.
        :raises InvalidWebhookError: for bad fields in *payload*; nothing is enqueued.
        :raises StorageUnavailableError: when the webhook cannot be registered; nothing is enqueued.
        """
        return register.enqueue_with_webhook(
            get_state(),
            queue,
            func,
            args,
            runid=runid,
            payload=payload,
            timeout=timeout if job_timeout is None else job_timeout,
            **enqueue_options,
        )

    def validate(self, fields: Mapping[str, Any]) -> bool:
        """Check webhook fields, for a view that wants to answer 400 before it enqueues anything.

        :param fields: a mapping such as ``request.get_json()``; other names in it are ignored.
        :returns: whether it asks for a webhook (and webhooks are enabled).
        :raises InvalidWebhookError: with every reason; unless handled, the app answers 400.
        """
        return register.load(get_state(), fields) is not None

    def watch(
        self,
        job: Job,
        url: str | None = None,
        *,
        secret: str | None = None,
        headers: Mapping[str, str] | None = None,
        runid: str | None = None,
        **fields: Any,
    ) -> str | None:
        """Report a job created elsewhere: by ``Job.create``, in a thread, by cron or another service.

        Without *url*, the webhook of the current request is used, that of the decorated view that is running
        or has run. If that request asks for none, and outside of such requests, nothing happens. A job that
        already carries the webhook is still reported once.

        A job created elsewhere carries no callback of ours, so reconcile reports it, within a little more
        than ``RECONCILE_INTERVAL``. The run that is waiting or running now counts, and every later one.

        :param fields: further request fields without their prefix: ``events``, ``format``, ``reference``,
            ``timeout``, ``retry_count``; and ``sign_payload``.
        :returns: the endpoint's id; ``None`` if no webhook is asked for, or webhooks are disabled.
        :raises InvalidWebhookError: when a value is not acceptable.
        :raises StorageUnavailableError: when the watch cannot be stored.
        """
        return register.watch(
            get_state(), job, {"url": url, "secret": secret, "headers": headers, **fields}, runid=runid
        )

    def instrument_rq(self) -> None:
        """Make plain ``rq.Queue`` objects carry the webhook inside decorated views. Idempotent."""
        job_callbacks.instrument()

    def uninstrument_rq(self) -> None:
        """Undo :meth:`instrument_rq` for this process."""
        job_callbacks.uninstrument()

    def send(
        self, event_type: str, data: Mapping[str, Any], *, runid: str | None = None, tenant: str | None = None
    ) -> str:
        """Send an application event to the standing endpoints that listen for it.

        :param event_type: dotted lower-case words such as ``"model.published"``; ``job.`` and
            ``webhook.`` are reserved.
        :param data: a JSON object.
        :param tenant: the customer whose event it is: its endpoints get it, too. Without it, only operators'.
        :returns: the event's id, which receivers see as ``webhook-id``.
        :raises ValueError: for any other *event_type*, and for a *tenant* that cannot be a tenant's name.
        :raises StorageUnavailableError: when the event cannot be stored.
        """
        if not is_application_type(event_type):
            raise ValueError(
                f"{event_type!r} is not an application event type; use dotted lower-case words that do not "
                "begin with 'job.' or 'webhook.', such as 'model.published'."
            )
        if tenant is not None and not tenants.is_tenant(tenant):
            raise ValueError(
                f"{tenant!r} is not a tenant's name; use a text of 1 to 128 printable characters."
            )
        occurrence = Occurrence(
            type=event_type,
            occurred_at=datetime.now(UTC),
            source=SOURCE_APPLICATION,
            runid=register.runid_text(runid),
            data=to_json_safe(dict(data)),
        )
        with tracing.registering(request.headers if has_request_context() else None) as trace:
            item = IngestItem(occurrence, tenant=tenant, trace=trace)
            (event,) = Publisher(get_state()).publish([item])
        return event.event_id

    # -- the host's functions -------------------------------------------------------------------------

    def authorize(self, function: Function) -> Function:
        """Register the function that decides who may see and do what.

        It is called with a permission, ``"status"`` (with ``job_id=`` and ``runid=``), ``"read"``,
        ``"manage"`` or ``"own"`` (with ``tenant=``), inside the request, and returns whether the caller has
        it. Until it is registered, nothing is served.
        """
        self.authorize_function = function
        return function

    def tenant(self, function: Function) -> Function:
        """Register the function that names the calling customer: a user, an organisation, an API key.

        It is called without arguments inside the request and returns a text of 1 to 128 printable
        characters, or ``None`` for a caller that is not a customer. Jobs, endpoints, events and deliveries
        then belong to that tenant, which may have standing endpoints of its own and, with the permission
        ``"own"``, can see and change what belongs to it.
        """
        self.tenant_function = function
        return function

    def scrub(self, function: Function) -> Function:
        """Register a function that edits a payload (a dict) before it is stored, and returns it."""
        self.scrub_function = function
        return function

    def payload_format(self, name: str) -> Callable[[Function], Function]:
        """Register a payload format under *name*: a function from the ``job`` payload to a dict or to bytes.

        :raises ConfigurationError: when *name* is one of ours or already taken.
        """

        def add(function: Function) -> Function:
            if name in self.formats:
                raise ConfigurationError(f"The payload format {name!r} exists already; choose another name.")
            self.formats[name] = custom_format(function)
            return function

        return add

    def error_envelope(self, function: Function) -> Function:
        """Register a function ``(code, message, details, status)`` that renders the body of a 400 or 503.

        It returns what a view may return; the status is set afterwards.
        """
        self.error_envelope_function = function
        return function


class _Commands(click.Command):
    """Our commands as a part of ``app.cli``, loaded when one of them is asked for.

    They are loaded by name, like an entry point: web processes need nothing that those commands import.
    """

    @staticmethod
    def _loaded() -> click.Command:
        found: click.Command = import_module(".cli", __package__).cli
        return found

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Return the context of the real commands, which is then invoked."""
        return self._loaded().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command of the context."""
        return ctx.command.invoke(ctx)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the line for the list of commands."""
        return self._loaded().get_short_help_str(limit)
