"""All of the package's access to Redis and RQ.

:mod:`job_callbacks` adds our callbacks to jobs when a queue creates them, and tells afterwards which of the
jobs were enqueued. The callbacks (:mod:`flask_rq_webhooks.callbacks`) append to a stream, the :mod:`outbox`;
:mod:`outbox_entry` validates its entries. :mod:`job_reader` reads what RQ committed, hashes and results,
without unpickling: :mod:`safe_pickle` reads plain values only. :mod:`abandoned_jobs` lets RQ end the jobs
that lost their worker. :mod:`redis_database` creates clients and tells databases apart;
:mod:`enqueue_observer` watches queues in the hosts' tests.
"""
