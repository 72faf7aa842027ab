"""A service whose clients are told by RQ's own webhooks."""

import os

import redis
import tasks
from flask import Flask, request
from rq import Queue, Webhook

app = Flask(__name__)
app.config.from_prefixed_env()
queue = Queue("default", connection=redis.Redis.from_url(os.environ["REDIS_URL"]))


@app.post("/reports/<runid>")
def make_report(runid):
    payload = request.get_json()
    url = payload.pop("webhook_url", None)
    told = [Webhook(url, status, method="POST") for status in ("finished", "failed")] if url else None
    job = queue.enqueue(tasks.make_report, runid, webhooks=told, **payload)
    return {"job_id": job.id}
