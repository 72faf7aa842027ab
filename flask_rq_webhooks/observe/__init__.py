"""From what RQ committed to events: each ending is stored once, with its deliveries.

:mod:`ingest` reads the callbacks' reports from the outbox; :mod:`reconcile` finds the endings nobody
reported, by way of :mod:`settled_watches`, :mod:`open_watches` and :mod:`job_trees`; the rules are in
:mod:`outcomes`, and :mod:`publisher` stores events and emits signals.
"""
