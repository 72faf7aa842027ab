"""The tasks."""

import os

from celery import Celery
from notifications import notify

celery = Celery("checks", broker=os.environ["CELERY_BROKER_URL"])


@celery.task(bind=True)
def check_document(self, text, webhook_url=None, sign=False):
    try:
        result = {"words": len(text.split()), "valid": check(text)}
    except Exception as exc:
        if webhook_url:
            notify(webhook_url, self.request.id, "check_document", error=str(exc), sign=sign)
        raise
    if webhook_url:
        notify(webhook_url, self.request.id, "check_document", result=result, sign=sign)
    return result


def check(text):
    if not text:
        raise ValueError("nothing to check")
    return "secret" not in text
