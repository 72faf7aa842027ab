"""``migrate`` makes the tables and one webhook per URL; ``fill COUNT`` queues deliveries."""

from __future__ import annotations

import itertools
import json
import os
import sys

import django

django.setup()

from django.core.management import call_command  # noqa: E402
from django_webhook.models import Webhook, WebhookEvent, WebhookSecret  # noqa: E402
from django_webhook.tasks import fire_webhook  # noqa: E402

from ..payload import SECRET, body_of  # noqa: E402
from .celery import app  # noqa: E402


def main() -> None:
    if sys.argv[1] == "migrate":
        call_command("migrate", verbosity=0)
        for url in json.loads(os.environ["BENCH_URLS"]):
            webhook = Webhook.objects.create(url=url)
            WebhookSecret.objects.create(webhook=webhook, token=SECRET)
        return
    WebhookEvent.objects.all().delete()
    ids = itertools.cycle(Webhook.objects.values_list("id", flat=True))
    with app.pool.acquire() as connection:
        for number in range(int(sys.argv[2])):
            body = body_of(f"job-{number}").decode()
            fire_webhook.apply_async(
                (next(ids), body),
                {"topic": "auth.User/update", "object_type": "auth.User"},
                connection=connection,
            )


if __name__ == "__main__":
    main()
