"""A service that checks documents in Celery tasks and notifies its clients of them."""

import tasks
from flask import Flask, request
from notifications import is_allowed

app = Flask(__name__)
app.config.from_prefixed_env()


@app.post("/api/v1/checks")
def check():
    payload = request.get_json()
    url = payload.get("webhook_url")
    if url and not is_allowed(url):
        return {"error": "webhook_url is not allowed"}, 400
    task = tasks.check_document.delay(
        payload["text"], webhook_url=url, sign=payload.get("sign_payload", False)
    )
    return {"task_id": task.id, "status": "PENDING"}, 202
