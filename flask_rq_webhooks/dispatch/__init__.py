"""From events to HTTP requests: the dispatcher, and the only HTTP sender of the package.

A :mod:`dispatcher` is one process with threads for ingest, sending and recording, and periodic jobs beside
them; :mod:`processes` runs several under one command. The :mod:`sender` claims due deliveries as far as
:mod:`host_limits` leaves places, :mod:`request_builder` decrypts, signs and orders headers, :mod:`http`
carries the bytes, the :mod:`recorder` stores the attempt and what follows from it, and :mod:`pubsub` tells
hosts that listen on Redis.
"""
