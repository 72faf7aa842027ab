"""What RQ says: the only Redis and the only RQ of the package.

In the order the data flows: :mod:`attach` gives jobs our callbacks; the callbacks write to the stream that
:mod:`outbox` reads; :mod:`rq_state` and :mod:`rq_details` read what RQ committed; :mod:`reconcile` compares
that with the promises kept in :mod:`flask_rq_webhooks.storage`, by way of :mod:`settled`, :mod:`waiting`
and :mod:`trees`, with the rules in :mod:`endings`.
"""
