"""Status notices on Redis pub/sub, for hosts that watch their runs there.

Nothing depends on them: a notice that cannot be published is lost, and no delivery waits for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..protocol.urls import redact_url

if TYPE_CHECKING:
    from ..config import Settings
    from ..storage.attempts import AttemptRecord

logger = logging.getLogger(__name__)

#: Channel on which every attempt is published, as JSON.
TELEMETRY_CHANNEL = "webhooks:telemetry"
#: Seconds to wait for Redis, and seconds for which nothing is published after a failure.
ANSWER_S, SILENCE_S = 0.25, 30.0


class Notices:
    """Publish the outcomes of attempts.

    :param redis: client to publish with. Closed by :meth:`close`.
    :param channel: for the status text; if it contains ``{runid}``, a job without a run id gets no text.
    """

    def __init__(self, redis: Redis, channel: str) -> None:
        self._redis = redis
        self._channel = channel
        self._silent_until = float("-inf")

    @classmethod
    def from_settings(cls, settings: Settings) -> Notices | None:
        """Return the notices configured by ``PUBSUB_URL`` and ``PUBSUB_CHANNEL``; ``None`` without a URL."""
        if settings.pubsub_url is None:
            return None
        redis = Redis.from_url(
            settings.pubsub_url,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
        )
        return cls(redis, settings.pubsub_channel)

    def publish(self, recorded: Sequence[tuple[AttemptRecord, str]]) -> None:
        """Publish the outcomes of attempts in one round trip; after a failure, publish nothing for a while.

        :param recorded: attempts, each with the current status of its delivery.
        """
        if not recorded or time.monotonic() < self._silent_until:
            return
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for record, status in recorded:
                    for channel, text in self._texts(record, status):
                        pipeline.publish(channel, text)
                pipeline.execute()
        except (RedisError, OSError) as exc:
            self._silent_until = time.monotonic() + SILENCE_S
            logger.warning(
                "Status notices cannot be published (%s: %s); none for %.0f s.",
                type(exc).__name__, exc, SILENCE_S,
            )  # fmt: skip

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _texts(self, record: AttemptRecord, status: str) -> list[tuple[str, str]]:
        delivery = record.delivery
        telemetry = {
            "job_id": delivery.job_id,
            "runid": delivery.runid,
            "url": redact_url(delivery.url),
            "status": status,
            "attempts": delivery.number,
            "timestamp": record.started_at.timestamp() + record.duration_ms / 1000,
        }
        texts = [(TELEMETRY_CHANNEL, json.dumps(telemetry))]
        if delivery.runid is not None or "{runid}" not in self._channel:
            channel = self._channel.replace("{runid}", delivery.runid or "")
            texts.append((channel, f"rq:{delivery.job_id} WEBHOOK {status} {delivery.event_type}"))
        return texts
