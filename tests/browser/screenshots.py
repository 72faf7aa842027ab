"""``make screenshots``: pictures of the pages for the documentation, from made-up deliveries.

``python -m tests.browser.screenshots [FOLDER]``, ``docs/_static`` by default.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flask import Flask
from sqlalchemy import update
from werkzeug.serving import WSGIRequestHandler, make_server

from flask_rq_webhooks.protocol.events import JOB_FAILURE, JOB_SUCCESS
from flask_rq_webhooks.state import State
from flask_rq_webhooks.storage.dispatchers import heartbeat
from flask_rq_webhooks.storage.models import Attempt, Delivery
from tests import storage_rows
from tests.browser.chromium import look, open_chromium
from tests.dashboard_app import add_delivery, add_endpoint, add_watch, attempt_all, open_host
from tests.servers import ROOT, valkey_server

#: Of the overview; the other pages are shown in one look each.
LOOKS = [("wide", "light"), ("wide", "dark"), ("phone", "light")]
PICTURE_HEIGHT = 820

HOSTS = ("hooks.example.com", "ci.example.org", "api.watershed.example", "flaky.example.net")


class _QuietHandler(WSGIRequestHandler):
    def log(self, *_args: object) -> None:
        """Keep quiet."""


@contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve *app* on loopback; give its URL."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_QuietHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fill(state: State) -> dict[str, str]:
    """Make a day of deliveries; return ids of some worth a picture."""
    chance = random.Random(7)
    heartbeat(state.database, "dsp_picture", started=True)
    standing = add_endpoint(
        state, "https://hooks.example.com/run-finished", description="Run archive",
        secret="only for the picture", headers={"X-Tenant": "blue-creek"},
    )  # fmt: skip
    add_endpoint(
        state, "https://ci.example.org/rq", events=("job.failure", "job.lost"), description="On call"
    )
    bound = [add_endpoint(state, f"https://{host}/hooks/jobs", kind="job", runid="blue-creek", secret="x")
             for host in HOSTS]  # fmt: skip
    now = datetime.now(UTC)
    for number in range(60):
        add_delivery(
            state, bound[number % 4], job_id=f"{chance.getrandbits(64):016x}", runid=f"run-{number % 9}",
            type=JOB_SUCCESS if chance.random() < 0.8 else JOB_FAILURE,
            func="watershed.jobs.build_landuse_rq", queue="default",
        )  # fmt: skip
    while attempt_all(state, storage_rows.SUCCEEDED, response_body=b'{"ok": true}'):
        pass
    for row in storage_rows.rows(state.database, Delivery):
        ended = now - timedelta(hours=24 * chance.random() ** 1.3)
        bad = row.host.startswith("flaky") and chance.random() < 0.6
        storage_rows.set_values(
            state.database, Delivery, row.id, finished_at=ended,
            **({"status": "exhausted", "error_code": "http_5xx", "status_code": 503} if bad else {}),
        )  # fmt: skip
        with state.database.write() as connection:
            connection.execute(
                update(Attempt)
                .where(Attempt.delivery_id == row.id)
                .values(
                    duration_ms=chance.lognormvariate(4.6, 0.6),
                    **({"status": "failed", "status_code": 503, "error_code": "http_5xx"} if bad else {}),
                )
            )
    failing = add_delivery(
        state, bound[3], job_id="7d1f0c3e-8a52-4d0b", runid="blue-creek", func="watershed.jobs.run_wepp_rq"
    )
    for code, body in ((503, b"upstream is restarting\n"), (503, b"<html><body><h1>503</h1></body></html>")):
        for row in storage_rows.rows(state.database, Delivery, Delivery.status == "pending"):
            storage_rows.set_values(state.database, Delivery, row.id, next_attempt_at=now)
        attempt_all(
            state, storage_rows.retry_in(287), status_code=code, error_code="http_5xx", response_body=body,
            response_headers={"content-type": "text/html", "server": "nginx", "retry-after": "30"},
            request_headers={"Content-Type": "application/json", "webhook-id": "evt_01jx…",
                             "webhook-signature": "***", "Authorization": "***"},
        )  # fmt: skip
    for number in range(5):
        add_watch(state, bound[0], f"waiting-{number}")
    own = add_endpoint(state, "https://acme.example/hooks", secret="only for the picture", tenant="acme")
    refused = add_delivery(state, own, job_id="2b6d9a10-44c1-4b7e", func="watershed.jobs.run_wepp_rq")
    attempt_all(
        state, storage_rows.EXHAUSTED, status_code=401, response_body=b'{"error": "unknown signature"}'
    )
    return {"endpoint": standing, "delivery": failing, "refused": refused}


def take(folder: Path) -> list[Path]:
    """Take every picture; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: list[Path] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        valkey_server() as valkey,
        open_host(f"sqlite:///{directory}/pictures.db", valkey.url, {"read", "manage", "own"}) as (
            app,
            state,
        ),
    ):
        ids = fill(state)
        pages = {
            "overview": ("/webhooks/", LOOKS),
            "deliveries": ("/webhooks/deliveries?status=pending&status=exhausted", [("wide", "dark")]),
            "delivery": (f"/webhooks/deliveries/{ids['delivery']}", [("wide", "light")]),
            "portal": (f"/webhooks/portal/deliveries/{ids['refused']}", [("wide", "light")]),
        }
        with served(app) as url, open_chromium() as driver:
            for name, (path, looks) in pages.items():
                state.hooks.tenant_function = (lambda: "acme") if name == "portal" else None
                for size, scheme in looks:
                    look(driver, size=size, scheme=scheme, height=PICTURE_HEIGHT)
                    driver.get(url + path)
                    taken.append(folder / f"dashboard-{name}-{size}-{scheme}.png")
                    taken[-1].write_bytes(driver.get_screenshot_as_png())
    return taken


if __name__ == "__main__":
    for file in take(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "_static"):
        print(f"{file.stat().st_size // 1024:5} KiB  {file}")
