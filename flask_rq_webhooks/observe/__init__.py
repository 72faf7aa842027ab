"""From what RQ committed to events: each ending is stored once, with its deliveries.

:mod:`ingest` reads the callbacks' reports from the outbox; :mod:`reconcile` finds the endings nobody
reported, by way of :mod:`open_watches` and :mod:`job_trees`. An *outcome* is how a run ended
(:mod:`outcomes`), a *conclusion* what it means for a watch (:mod:`conclusions`), an *occurrence* the outcome
with all that is known of the run. :mod:`publisher` makes occurrences, stores them and emits signals.
"""
