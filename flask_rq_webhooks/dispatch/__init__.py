"""From events to HTTP requests: the dispatcher, and the only HTTP sender of the package.

:mod:`sender` claims due deliveries, :mod:`request_builder` signs them and builds requests, :mod:`http`
carries the bytes, :mod:`recorder` stores the attempt and what follows from it. :mod:`dispatcher` is the
process around them.
"""
