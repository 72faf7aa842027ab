"""Persistent state: the only SQL in the package.

The foundations: tables (:mod:`models`, upgraded by :mod:`schema`), our own small engine (:mod:`database`,
:mod:`sql_errors`), inserts of many rows (:mod:`bulk_insert`), encryption at rest (:mod:`crypto`).

Next come the writes of the pipeline, in its order. A request becomes an endpoint and watches
(:mod:`endpoints`; operators and customers make :mod:`standing_endpoints`). Every reconcile pass reads the
:mod:`watches`, including those of trees. An occurrence becomes an event (:mod:`events`) with one delivery
per subscribed endpoint (:mod:`subscriptions`) and settles its watches (:mod:`reported_runs`). A dispatcher
(:mod:`dispatchers`) leases deliveries (:mod:`claims`) and records the response and what follows
(:mod:`attempts`).

Last come reads and actions for people: :mod:`queries` with :mod:`filters`, the :mod:`feed` and
:mod:`statistics`; :mod:`deliveries` resends, recovers and cancels, :mod:`retention` prunes and erases.

Knows nothing of requests, Redis, RQ or HTTP.
"""
