"""What RQ says: the only Redis and the only RQ of the package.

Attaches callbacks to jobs, reads and writes the outbox stream, reads RQ's committed state, and
reconciles it with the promises kept in :mod:`flask_rq_webhooks.storage`.
"""
