"""From what RQ committed to events: each ending is stored once, with its deliveries.

There are two ways in. :mod:`ingest` reads the callbacks' reports from the outbox and confirms them against
RQ; :mod:`reconcile` compares what SQL watches (:mod:`open_watches`, :mod:`job_trees`) with RQ and finds the
endings nobody reported. Both go through four stages: an *outcome* is how a run ended (:mod:`outcomes`, the
only place with these rules), a *conclusion* is what it means for a watch (:mod:`conclusions`), an
*occurrence* is the outcome with everything known about the run, an *event* is what is stored of it.
:mod:`publisher` creates the last two and emits signals.
"""
