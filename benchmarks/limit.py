"""The limit: the HTTP client alone. Signed bytes made before, nothing claimed, nothing recorded.

``python -m benchmarks.limit THREADS COUNT URL…``: so many threads send prepared requests through one pooled
:mod:`requests` adapter.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time

import requests
from requests.adapters import HTTPAdapter

from flask_rq_webhooks.protocol.signatures import signature_headers

from .payload import SECRET, body_of


def main(threads: int, count: int, urls: list[str]) -> None:
    body = body_of("a job")
    timestamp = int(time.time())
    signed = signature_headers(
        [SECRET],
        event_id="evt_1",
        timestamp=timestamp,
        body=body,
        header_prefix="X-Webhook",
        iso_timestamp=False,
    )
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "benchmark",
        "webhook-id": "evt_1",
        "webhook-timestamp": str(timestamp),
        "X-Webhook-Event": "job.success",
        "X-Webhook-Delivery": "dlv_1",
        "X-Webhook-Attempt": "1",
        **signed,
    }
    prepared = []
    for url in urls:
        request = requests.PreparedRequest()
        request.prepare(method="POST", url=url, headers=headers, data=body)
        prepared.append(request)
    adapter = HTTPAdapter(pool_connections=len(urls), pool_maxsize=threads)
    numbers = itertools.count()

    def work() -> None:
        while (number := next(numbers)) < count:
            response = adapter.send(prepared[number % len(prepared)], timeout=15)
            assert response.status_code == 200
            response.content  # noqa: B018  (reads it, so that the connection is kept)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
