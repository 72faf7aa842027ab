"""What is remembered: the only SQL of the package.

Below are the tables (:mod:`models`, upgraded by :mod:`schema`), our own small engine (:mod:`database`,
:mod:`sql_errors`), inserts of many rows (:mod:`bulk_insert`) and encryption at rest (:mod:`crypto`).

Then what the pipeline writes, in its order: a request becomes an endpoint and watches (:mod:`endpoints`;
:mod:`standing_endpoints` are made by operators and customers); :mod:`watches`, those of trees included, are
read by every pass of reconcile; an occurrence becomes an event (:mod:`events`) with one delivery per
subscribed endpoint (:mod:`subscriptions`) and settles its watches (:mod:`reported_runs`); a dispatcher
(:mod:`dispatchers`) leases deliveries (:mod:`claims`) and records what came back and what follows
(:mod:`attempts`).

Last what people read and do: :mod:`queries` with :mod:`filters`, the :mod:`feed`, :mod:`statistics`;
:mod:`deliveries` resends, recovers and cancels, :mod:`retention` prunes and erases.

Knows nothing of requests, Redis, RQ or HTTP.
"""
