"""From what RQ committed to events: each ending is stored once, with its deliveries.

Two ways lead in. :mod:`ingest` reads the callbacks' reports from the outbox and confirms them against RQ;
:mod:`reconcile` compares what SQL watches (:mod:`open_watches`, :mod:`job_trees`) with RQ and finds the
endings nobody reported. Both go through four stages: an *outcome* is how a run ended (:mod:`outcomes`, the
one rule book), a *conclusion* what it means for a watch (:mod:`conclusions`), an *occurrence* the outcome
with all that is known of the run, an *event* what is stored of it. :mod:`publisher` makes the last two and
emits signals.
"""
