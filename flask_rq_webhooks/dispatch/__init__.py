"""From events to HTTP requests: the dispatcher, and the only HTTP sender of the package.

A :mod:`dispatcher` is one process with threads for ingest, sending and recording, and with periodic jobs;
:mod:`processes` runs several dispatchers under one command. The :mod:`sender` claims as many due deliveries
as :mod:`host_limits` allows, :mod:`request_builder` decrypts, signs and assembles headers, :mod:`http` sends
the bytes, the :mod:`recorder` stores the attempt and its consequences, and :mod:`pubsub` notifies host apps
that listen on Redis.
"""
