"""What one app needs, built once: settings, database, Redis, keys, policies, formats.

Stored in ``app.extensions["rq_webhooks"]``. Everything that opens a connection is built on first use, so
``init_app`` works before ``db.init_app`` and without any server. Does not know about requests, views, or how
deliveries are sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from flask import Flask, current_app, has_app_context
from redis import Redis

from .config import Settings
from .errors import ConfigurationError
from .protocol.payloads import PayloadFormat, RenderContext, Rendered
from .protocol.signatures import SigningKey
from .protocol.urls import UrlPolicy
from .queue.outbox import Outbox
from .queue.redis_database import connect
from .storage.attempts import RetryPolicy
from .storage.crypto import Cipher
from .storage.database import Database, make_url
from .storage.dispatchers import shared_namespace

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy

    from .protocol.events import Occurrence
    from .storage.models import Endpoint

EXTENSION_NAME = "rq_webhooks"

Authorize = Callable[..., bool]
Scrub = Callable[[dict[str, Any]], dict[str, Any] | None]
ErrorEnvelope = Callable[..., Any]
Tenant = Callable[[], str | None]
Built = TypeVar("Built")


class Hooks(Protocol):
    """The host's own functions, kept on the extension object and shared by its apps."""

    authorize_function: Authorize | None
    scrub_function: Scrub | None
    error_envelope_function: ErrorEnvelope | None
    tenant_function: Tenant | None

    @property
    def formats(self) -> Mapping[str, PayloadFormat]:
        """Return the payload formats by name."""


class State:
    """Everything that belongs to one app. Read-only for its users; built lazily, once, in any thread.

    :param app: the app; its config has been read into *settings*.
    :param hooks: the extension object.
    :param db: the host's Flask-SQLAlchemy object, or ``None``.
    :param redis: a client, a function that returns one, or ``None`` for ``REDIS_URL``.
    """

    def __init__(
        self,
        app: Flask,
        settings: Settings,
        hooks: Hooks,
        *,
        db: SQLAlchemy | None = None,
        redis: Redis | Callable[[], Redis] | None = None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.hooks = hooks
        self.url_policy = UrlPolicy(
            allow_http=settings.allow_http,
            allow_networks=settings.allow_networks,
            deny_networks=settings.deny_networks,
            allowed_domains=settings.allowed_domains,
            blocked_ports=settings.blocked_ports,
            allow_nat64=settings.allow_nat64,
        )
        self.retry_policy = RetryPolicy(
            schedule=settings.retry_schedule, statuses=frozenset(settings.retry_statuses)
        )
        try:
            self.signing_keys = tuple(SigningKey(text) for text in settings.signing_keys)
        except ValueError as exc:
            raise ConfigurationError(
                f"RQ_WEBHOOKS_SIGNING_KEYS has an entry that is not a key: {exc}."
            ) from None
        self._db = db
        self._redis_source = redis
        self._lock = threading.RLock()
        self._built: dict[str, Any] = {}

    def once(self, name: str, build: Callable[[], Built]) -> Built:
        """Return what *build* returned when *name* was first requested for this app; thread-safe."""
        try:
            built: Built = self._built[name]
        except KeyError:
            with self._lock:
                if name not in self._built:
                    self._built[name] = build()
                built = self._built[name]
        return built

    @property
    def formats(self) -> Mapping[str, PayloadFormat]:
        """Return the payload formats by name: ours and the host's."""
        return self.hooks.formats

    @property
    def database(self) -> Database:
        """Return our own database access.

        :raises ConfigurationError: when no setting tells where the database is.
        """
        return self.once("database", self._build_database)

    @property
    def cipher(self) -> Cipher:
        """Return the cipher that encrypts secrets and headers at rest.

        :raises ConfigurationError: when there is neither ``SECRET_KEY`` nor ``ENCRYPTION_KEYS``.
        """
        keys, config = self.settings.encryption_keys, self.app.config
        fallbacks = config.get("SECRET_KEY_FALLBACKS") or ()
        return self.once("cipher", lambda: Cipher.from_config(keys, config.get("SECRET_KEY"), fallbacks))

    @property
    def redis(self) -> Redis:
        """Return a client for the Redis database RQ uses."""
        return self.once("redis", self._build_redis)

    @property
    def redis_is_given(self) -> bool:
        """Return whether the host passed a client, so that ``RQ_WEBHOOKS_REDIS_URL`` is not read."""
        return self._redis_source is not None

    @property
    def namespace(self) -> str:
        """Return the part of our Redis keys that is unique to this SQL database."""
        return self.once("namespace", lambda: shared_namespace(self.database))

    @property
    def outbox(self) -> Outbox:
        """Return the stream the callbacks write to."""
        maxlen = self.settings.outbox_maxlen
        return self.once("outbox", lambda: Outbox(self.redis, self.namespace, maxlen=maxlen))

    def render(self, endpoint: Endpoint | Any, event_id: str, occurrence: Occurrence) -> bytes | Rendered:
        """Return the body for *endpoint* and its media type: stored, signed and sent unchanged.

        :param endpoint: a row with ``format``, ``runid`` and ``reference``.
        :raises ConfigurationError: when the endpoint's format is not registered in this process.
        """
        try:
            render = self.formats[endpoint.format]
        except KeyError:
            raise ConfigurationError(
                f"Payload format {endpoint.format!r} of endpoint {endpoint.id} is not registered here; "
                "register it with @webhooks.payload_format in every process, the dispatcher included."
            ) from None
        runid = endpoint.runid or occurrence.runid
        return render(occurrence, self.render_context(event_id, runid, endpoint.reference))

    def render_context(
        self, event_id: str, runid: str | None = None, reference: str | None = None
    ) -> RenderContext:
        """Return what a payload contains besides the occurrence, within the limits of this app's settings."""
        settings = self.settings
        return RenderContext(
            event_id=event_id,
            runid=runid,
            reference=reference,
            traceback=settings.traceback,
            include_result=settings.include_result,
            max_bytes=settings.max_payload_bytes,
        )

    def _build_database(self) -> Database:
        settings, config = self.settings, self.app.config
        if settings.database_uri is not None:
            return self._shared(settings.database_uri) or Database(settings.database_uri)
        if self._db is not None:
            engines = self._host_engines(self._db)
            if settings.bind_key not in engines:
                raise ConfigurationError(
                    f"RQ_WEBHOOKS_BIND_KEY is {settings.bind_key!r}, but SQLALCHEMY_BINDS has no such bind."
                    if settings.bind_key is not None
                    else "SQLALCHEMY_DATABASE_URI is not set; set it, or RQ_WEBHOOKS_DATABASE_URI."
                )
            return self._like_host(self._db, settings.bind_key)
        bind: Any = (config.get("SQLALCHEMY_BINDS") or {}).get(settings.bind_key)
        if settings.bind_key is None:
            bind = {
                **(config.get("SQLALCHEMY_ENGINE_OPTIONS") or {}),
                "url": config.get("SQLALCHEMY_DATABASE_URI"),
            }
        elif not isinstance(bind, Mapping):
            bind = {"url": bind}
        if bind["url"] is None:
            raise ConfigurationError(
                "flask_rq_webhooks does not know its database; set RQ_WEBHOOKS_DATABASE_URI or "
                "SQLALCHEMY_DATABASE_URI, or pass db= to RQWebhooks."
            )
        return Database(bind["url"], connect_args=bind.get("connect_args"), own_file=False)

    def _shared(self, uri: str) -> Database | None:
        """Return the database *uri* opened like the host opens it, if it is one of the host's databases."""
        if self._db is None:
            return None
        with suppress(ConfigurationError):
            for bind_key, engine in self._host_engines(self._db).items():
                if engine.url == make_url(uri):
                    return self._like_host(self._db, bind_key)
        return None

    def _like_host(self, db: SQLAlchemy, bind_key: str | None) -> Database:
        engine = self._host_engines(db)[bind_key]
        # The schema in which db.create_all() and migrations put our tables.
        schema = db.metadatas[bind_key].schema if bind_key in db.metadatas else None
        renamed = engine.get_execution_options().get("schema_translate_map") or {}
        return Database(engine.url, host=engine, schema=renamed.get(schema, schema))

    def _host_engines(self, db: SQLAlchemy) -> Mapping[str | None, Any]:
        try:
            if has_app_context() and current_app._get_current_object() is self.app:  # type: ignore[attr-defined]
                return db.engines
            with self.app.app_context():
                return db.engines
        except RuntimeError as exc:
            raise ConfigurationError(
                "The SQLAlchemy object given to RQWebhooks is not initialised for this app; call "
                "db.init_app(app) before the first request, or set RQ_WEBHOOKS_DATABASE_URI."
            ) from exc

    def _build_redis(self) -> Redis:
        source = self._redis_source
        if source is None:
            return connect(self.settings.redis_url)
        return source() if not isinstance(source, Redis) and callable(source) else source


def get_state(app: Flask | None = None) -> State:
    """Return the state of *app*, or of the current app.

    :raises ConfigurationError: when the extension was not initialised for that app.
    """
    app = app or current_app
    try:
        return cast(State, app.extensions[EXTENSION_NAME])
    except KeyError:
        raise ConfigurationError(
            f"flask_rq_webhooks is not initialised for the app {app.name!r}; "
            "call RQWebhooks(db=db).init_app(app)."
        ) from None
