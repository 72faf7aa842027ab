"""What happens in the worker when a simulation has ended."""

import requests


def on_success(job, connection, result, *args, **kwargs):
    connection.hincrby("simulations", "finished", 1)
    post(job, {"job": job.id, "state": "done", "result": result})


def on_failure(job, connection, kind, value, traceback):
    post(job, {"job": job.id, "state": "failed", "reason": str(value)})


def post(job, body):
    if url := job.meta.get("callback_url"):
        requests.post(url, json=body, timeout=10).raise_for_status()
