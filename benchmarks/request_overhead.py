"""What ``accepts_webhook`` costs a request that asks for no webhook.

Run: ``python benchmarks/request_overhead.py``. Prints the median time of a view that parses its body, plain
and decorated, in microseconds.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, request
from werkzeug.test import EnvironBuilder, encode_multipart

from flask_rq_webhooks import RQWebhooks

ROUNDS = 4000


def median_us(
    app: Flask, view: Callable[[], Any], body: bytes | None, content_type: str | None, rounds: int = ROUNDS
) -> float:
    """Return the median time of one call of *view* within its request."""
    times = []
    for _ in range(rounds):
        environ = EnvironBuilder(method="POST", data=body, content_type=content_type).get_environ()
        with app.request_context(environ):
            began = time.perf_counter()
            view()
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


#: Bodies of requests that ask for no webhook.
SMALL_JSON = json.dumps({"a": 1, "b_c": [1, 2, 3]}).encode()
LARGE_JSON = json.dumps({"a_b": ["x" * 10] * 8_000}).encode()


def json_turns_us(body: bytes, rounds: int) -> list[tuple[float, float]]:
    """Return the times of a view that parses a JSON body, plain and decorated, in ten turns."""
    app = Flask("benchmark")
    app.config.update(SECRET_KEY="benchmark", SQLALCHEMY_DATABASE_URI="sqlite://")

    def view() -> str:
        return str(len(request.get_json()))

    decorated = RQWebhooks(app).accepts_webhook(view)
    return [
        (
            median_us(app, view, body, "application/json", rounds // 10),
            median_us(app, decorated, body, "application/json", rounds // 10),
        )
        for _ in range(10)
    ]


def main() -> None:
    """Measure every kind of body."""
    app = Flask("benchmark")
    app.config.update(SECRET_KEY="benchmark", SQLALCHEMY_DATABASE_URI="sqlite://")
    accepts_webhook = RQWebhooks(app).accepts_webhook
    boundary, multipart = encode_multipart({"a": "1", "file": (io.BytesIO(b"x" * 100_000), "soil.txt")})
    bodies: list[tuple[str, bytes | None, str | None]] = [
        ("no body", None, None),
        ("small JSON", SMALL_JSON, "application/json"),
        ("10 kB JSON", json.dumps({"a_b": "x" * 10_000}).encode(), "application/json"),
        ("100 kB JSON", LARGE_JSON, "application/json"),
        ("small form", b"a=1&b_c=2", "application/x-www-form-urlencoded"),
        ("100 kB multipart", multipart, f"multipart/form-data; boundary={boundary}"),
    ]
    for name, body, content_type in bodies:

        def view(is_json: bool = content_type == "application/json") -> str:
            return str(len(request.get_json() if is_json else request.form))

        plain = median_us(app, view, body, content_type)
        decorated = median_us(app, accepts_webhook(view), body, content_type)
        more = decorated - plain
        print(f"{name:18} plain {plain:7.1f} µs  decorated {decorated:7.1f} µs  more {more:6.1f} µs")


if __name__ == "__main__":
    main()
