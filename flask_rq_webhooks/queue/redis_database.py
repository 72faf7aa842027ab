"""Create our own Redis client, and identify the database behind a client, to compare or name databases."""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError
from redis.retry import Retry


def redis_identity(connection: Redis) -> str | None:
    """Return what identifies a Redis database: the server's run id and the database number.

    A restarted server has a new run id, so use the result for comparing only, and do not store it.

    :returns: ``None`` if the server hides it (an ACL or a proxy forbids ``INFO``, fakeredis).
    :raises redis.RedisError: when Redis cannot be reached.
    """
    try:
        run_id = connection.info("server").get("run_id")
    except RedisConnectionError:
        raise
    except (ResponseError, NotImplementedError):
        return None
    return f"{run_id}/{_database_number(connection)}" if run_id else None


def redis_parameters(connection: Redis) -> tuple[Any, ...]:
    """Return the address *connection* was created for; if two are equal, the database is the same.

    Two different addresses may still lead to the same database, under different names.
    """
    pool = connection.connection_pool
    kwargs = pool.connection_kwargs
    database = _database_number(connection)
    if kwargs.get("server") is not None:  # fakeredis: the object that holds the data
        return ("fake", id(kwargs["server"]), database)
    manager = getattr(pool, "sentinel_manager", None)
    if manager is not None:
        sentinels = sorted(redis_parameters(sentinel) for sentinel in manager.sentinels)
        return ("sentinel", getattr(pool, "service_name", None), tuple(sentinels), database)
    if kwargs.get("path"):
        return ("unix", kwargs["path"], database)
    host = str(kwargs.get("host") or "localhost").lower()
    if host in ("127.0.0.1", "::1"):
        host = "localhost"
    return ("tcp", host, int(kwargs.get("port") or 6379), database)


def database_name(connection: Redis) -> str:
    """Return a human-readable name of the database, without user name and password."""
    kind, where, *more = redis_parameters(connection)
    database = more[-1]
    if kind == "tcp":
        return f"redis://{where}:{more[0]}/{database}"
    if kind == "fake":
        return f"fakeredis server {where:#x}, database {database}"
    return f"{kind} {where}, database {database}"


def _database_number(connection: Redis) -> int:
    return int(connection.connection_pool.connection_kwargs.get("db") or 0)


def connect(url: str) -> Redis:
    """Return our own client for *url*; it opens no connection yet.

    After a failover an open connection may lead to a server that is now a replica. Without Sentinel, redis-py
    keeps that connection and keeps failing; here it is closed and the command is sent again on a new one.
    """
    client = Redis.from_url(
        url,
        socket_connect_timeout=2,
        socket_timeout=10,
        health_check_interval=30,
        # The client's default retries block the caller for seconds while Redis is down.
        retry=Retry(NoBackoff(), 1),
        retry_on_error=[RedisConnectionError],  # redis-py before 6 retries nothing by default
    )
    pool = client.connection_pool
    pool.connection_class = type("WritableConnection", (_ClosedByReadOnly, pool.connection_class), {})
    return client


class _ClosedByReadOnly:
    """A connection, over any transport, that is not used again after a ``READONLY`` answer."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Read an answer like the client does, but close the connection on ``READONLY``."""
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except ReadOnlyError as exc:
            self.disconnect()  # type: ignore[attr-defined]
            raise RedisConnectionError(f"This server is a replica now: {exc}") from exc
