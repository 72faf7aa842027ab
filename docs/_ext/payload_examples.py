"""The directive ``rq-webhooks-payload``: example bodies, rendered by the code that renders real ones.

``.. rq-webhooks-payload:: job failure`` shows the body of one format for one kind of ending.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from flask_rq_webhooks.protocol.events import Occurrence
from flask_rq_webhooks.protocol.payloads import FORMATS, RenderContext, as_rendered

ENDED_AT = datetime(2024, 1, 1, 0, 0, 0, tzinfo=UTC)

SUCCESS = Occurrence(
    type="job.success",
    occurred_at=ENDED_AT,
    source="callback",
    job_id="7d6e4a5e-3a52-4c0e-9c57-0f6f1d0c5d1a",
    run="2023-12-31T23:59:55.000000Z",
    runid="blue-creek",
    func="example_app.jobs.build_soils_rq",
    queue="default",
    enqueued_at=ENDED_AT - timedelta(seconds=5),
    started_at=ENDED_AT - timedelta(seconds=4),
    ended_at=ENDED_AT,
    result={"depth_factor": 1.0, "capacity_mm": {"1": 162.0, "2": 112.0}},
    sequence=1,
)
ENDINGS = {
    "success": SUCCESS,
    "failure": replace(
        SUCCESS,
        type="job.failure",
        func="example_app.jobs.build_climate_rq",
        result=None,
        error={
            "type": "InputError",
            "message": "climate.csv, line 4: tmin_c 6.5 is above tmax_c -2",
            "traceback": "Traceback (most recent call last):\n  ...\n"
            "example_app.model.InputError: climate.csv, line 4: tmin_c 6.5 is above tmax_c -2\n",
        },
    ),
    "stopped": replace(SUCCESS, type="job.stopped", result=None),
    "lost": replace(
        SUCCESS, type="job.lost", source="reconciled", result=None, started_at=None, ended_at=None
    ),
    "tree": replace(
        SUCCESS,
        type="job.failure",
        source="reconciled",
        func="example_app.jobs.run_wepp_rq",
        result=None,
        error={
            "type": "ValueError",
            "message": "hillslope 2 has no soil",
            "traceback": "Traceback (most recent call last):\n  ...\nValueError: hillslope 2 has no soil\n",
        },
        scope="tree",
        jobs={"finished": 3, "failed": 1, "deferred": 1},
    ),
    "correction": replace(
        SUCCESS, source="reconciled", sequence=2, supersedes="evt_01hk1g5t00zz9yx8wv7ut6sr5q"
    ),
    "exhausted": Occurrence(
        type="webhook.delivery_exhausted",
        occurred_at=ENDED_AT,
        source="application",
        data={
            "delivery_id": "dlv_01hk1g8w00cd3ef4gh5jk6mn7p",
            "event_id": "evt_01hk1g5t00zz9yx8wv7ut6sr5q",
            "event": "job.success",
            "job_id": SUCCESS.job_id,
            "endpoint_id": "ep0_01hk1g5s00ef3gh4jk5mn6pq7r",
            "url": "https://client.example/hook",
            "attempts": 12,
            "error_code": "http_5xx",
            "status_code": 503,
        },
    ),
    "started": replace(
        SUCCESS,
        type="job.started",
        source="reconciled",
        occurred_at=SUCCESS.started_at,
        ended_at=None,
        result=None,
    ),
    "stalled": replace(
        SUCCESS, type="job.stalled", source="reconciled", ended_at=None, result=None, sequence=2
    ),
    "progress": replace(
        SUCCESS,
        type="job.progress",
        source="reconciled",
        ended_at=None,
        result=None,
        progress={"step": 3, "of": 9},
        sequence=2,
    ),
    "disabled": Occurrence(
        type="webhook.endpoint_disabled",
        occurred_at=ENDED_AT,
        source="application",
        data={
            "endpoint_id": "ep0_01hk1g5s00ef3gh4jk5mn6pq7r",
            "url": "https://client.example/hook",
            "reason": "failing",
        },
    ),
    "application": Occurrence(
        type="model.published",
        occurred_at=ENDED_AT,
        source="application",
        data={"model": "blue-creek", "version": 3},
    ),
}
CONTEXT = RenderContext(
    event_id="evt_01hk1g8w00ab3cd4ef5gh6jk7m",
    runid=None,
    reference="order-1138",
    traceback="full",
    include_result=True,
    max_bytes=262_144,
)


class PayloadExample(Directive):
    """The body, indented for reading; on the wire it is compact."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        body, _content_type = as_rendered(FORMATS[self.arguments[0]](ENDINGS[self.arguments[1]], CONTEXT))
        text = json.dumps(json.loads(body), indent=2)
        block = nodes.literal_block(text, text)
        block["language"] = "json"
        return [block]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("rq-webhooks-payload", PayloadExample)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
