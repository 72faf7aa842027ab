"""What people and API clients see: the only Flask views of the package.

Around a host's own view: :mod:`decorators`, with :mod:`fields` and :mod:`registering`. For clients and
operators: :mod:`api` with its schemas, and the pages of :mod:`dashboard`. Reads and changes by way of
``storage``; sends nothing itself.
"""
