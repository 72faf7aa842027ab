"""The only Redis and the only RQ of the package.

:mod:`job_callbacks` puts our callbacks on jobs as a queue creates them, and says afterwards which of them
were enqueued. The callbacks (:mod:`flask_rq_webhooks.callbacks`) append to a stream, the :mod:`outbox`, whose
entries :mod:`outbox_entry` validates. :mod:`job_reader` reads what RQ committed, hashes and results, without
unpickling: :mod:`safe_pickle` reads plain values only. :mod:`abandoned_jobs` lets RQ end the jobs that lost
their worker. :mod:`redis_database` makes clients and tells databases apart; :mod:`enqueue_observer` watches
queues in the tests of hosts.
"""
