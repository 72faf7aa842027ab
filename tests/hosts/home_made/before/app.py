"""A service whose jobs post to their clients themselves."""

import os

import notify
import redis
import tasks
from flask import Flask, request
from rq import Callback, Queue

app = Flask(__name__)
app.config.from_prefixed_env()
queue = Queue("default", connection=redis.Redis.from_url(os.environ["REDIS_URL"]))


@app.post("/simulations")
def simulate():
    payload = request.get_json()
    job = queue.enqueue_call(
        tasks.simulate,
        (payload["steps"],),
        meta={"callback_url": payload.get("callback_url")},
        on_success=Callback(notify.on_success),
        on_failure=Callback(notify.on_failure),
    )
    return {"job_id": job.id}, 202
