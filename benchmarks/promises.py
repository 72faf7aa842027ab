"""What the pipeline promises, in the words of the documentation's table.

A line of a report names the promise it is about by its key; the figure that has to be reached stands with
the measurement. Knows nothing of how anything is measured.
"""

from __future__ import annotations

from typing import Final

#: Words by key, in the order of the table.
PROMISES: Final[dict[str, str]] = {
    "limit": "Deliveries/s, receivers that answer at once, one dispatcher, as a share of the *limit*",
    "job-per-attempt": "Deliveries/s against *job per attempt*",
    "django-webhook": "Deliveries/s against *django-webhook + Celery*",
    "naive": "Deliveries/s, 40 receivers of 50 ms, against *inline* and *rq.Webhook*, one worker each",
    "callback": "A job slowed by the callback (a job that does nothing, with and without)",
    "callback-independent": "The same while receivers are slow: independent of their latency",
    "route": "A decorated route with a webhook against the same route undecorated, median",
    "route-unused": "A decorated route without ``webhook_url`` against undecorated, median",
    "look": "The same where customers may subscribe, and the caller has no endpoint",
    "latency": "From the end of a job until it is received, 20 jobs a second",
    "hanging": "Healthy hosts while one of ten hangs: time to finish against that without it",
    "strangers": "Healthy hosts while 4,000 hosts of a stranger hang: time until received",
    "growth": "Rate of claim and record with a long history, and with a long backlog, against 10,000 rows",
    "pruning": "Rate of claim and record, and the longest one, while a long history is pruned",
    "memory": "Resident memory of a dispatcher with a long backlog",
    "processes": "``--processes 2`` against one process, receivers that answer at once, PostgreSQL",
    "two-dispatchers": "Two dispatchers against one, receivers of 50 ms, PostgreSQL, CPU not saturated",
    "fan-out": "An event to 20 endpoints of its customer: among 20,000 of others against alone",
    "lists": "Lists of one customer's own, 1,000 customers with 1,000 deliveries each, PostgreSQL, p95",
    "upgrade": "``init-db`` from the version before customers, 1,000,000 deliveries, with the app up",
}
