"""Count the jobs in Redis whose callbacks are ours: while one of them may run, workers need the package."""

import collections
import os

import redis

connection = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://localhost:6379/0"))
kinds = ("success", "failure", "stopped")
left = collections.Counter()
for key in connection.scan_iter("rq:job:*", count=1000):
    if connection.type(key) == b"hash":
        status, *names = connection.hmget(key, "status", *(f"{kind}_callback_name" for kind in kinds))
        if any((name or b"").startswith(b"flask_rq_webhooks.") for name in names):
            left[(status or b"unknown").decode()] += 1
for status, number in sorted(left.items()):
    print(f"{status}: {number}")
print(f"{sum(left.values())} jobs")
