"""The only code of the package that uses Redis and RQ.

:mod:`job_callbacks` puts our callbacks on jobs as a queue creates them, and tells afterwards which of them
were enqueued. The callbacks (:mod:`flask_rq_webhooks.callbacks`) append to a stream, the :mod:`outbox`, whose
entries :mod:`outbox_entry` validates. :mod:`job_reader` reads what RQ committed, hashes and results, without
unpickling: :mod:`safe_pickle` reads plain values only. :mod:`abandoned_jobs` lets RQ end the jobs whose
worker is gone. :mod:`redis_database` creates clients and tells databases apart; :mod:`enqueue_observer`
watches queues in hosts' tests.
"""
