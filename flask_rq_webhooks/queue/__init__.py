"""The only Redis and the only RQ of the package.

:mod:`job_callbacks` attaches our callbacks to jobs; the callbacks write to the stream that :mod:`outbox`
reads; :mod:`job_reader` reads what RQ committed; :mod:`abandoned_jobs` lets RQ end the jobs that lost their
worker.
"""
