"""Turn what RQ committed into events: each ending is stored once, with its deliveries.

There are two inputs. :mod:`ingest` reads the callbacks' reports from the outbox and confirms them against RQ;
:mod:`reconcile` compares the watches in SQL (:mod:`open_watches`, :mod:`job_trees`) with RQ and finds the
endings nobody reported. Both use four stages: an *outcome* is how a run ended (:mod:`outcomes` holds all the
rules), a *conclusion* is what it means for a watch (:mod:`conclusions`), an *occurrence* is the outcome with
everything known about the run, and an *event* is what is stored of it. :mod:`publisher` creates the last two
and emits signals.
"""
