"""The one payload that all contenders send. Standard library only: workers import it."""

from __future__ import annotations

import json

SECRET = "the secret of one client"
#: What a job returns: about half a kilobyte of body.
RESULT = {"runid": "basin-7", "outlet": "/data/basin-7/outlet.tif", "peaks_mm": [12.5, 13.25, 0.5, 7.75] * 8}


def body_of(job_id: str) -> bytes:
    """Return a body as long as ours."""
    return json.dumps(
        {"event": "job.success", "job_id": job_id, "runid": "basin-7", "timestamp": 1704067200.0,
         "result": RESULT, "id": "evt_" + 26 * "0", "func": "tasks.run_model", "queue": "default",
         "enqueued_at": "2024-01-01T00:00:00.000000Z", "started_at": "2024-01-01T00:00:00.000000Z",
         "ended_at": "2024-01-01T00:00:00.000000Z", "source": "callback", "reference": None}
    ).encode()  # fmt: skip
