"""What is sent over the wire and in what form, as pure functions and values.

:mod:`events` defines the vocabulary: event types, the ``Occurrence``, and the key that makes the end of a run
unique. :mod:`payloads` renders an occurrence in the four formats and makes it fit the size limit;
:mod:`json_safe` turns any Python value into JSON without raising, and :mod:`job_errors` extracts a failure's
type, message and traceback. :mod:`signatures` signs; :mod:`headers` and :mod:`urls` decide what a client may
make us send, and where.

No I/O, no Flask, no RQ, no SQL: clock and resolver are passed in. Imports nothing from the package except
:mod:`flask_rq_webhooks.errors`.
"""
