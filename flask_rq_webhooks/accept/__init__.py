"""From a request to a promise: the webhook fields of a request become an endpoint and a watch.

:mod:`decorator` surrounds the view and owns the order of things. :mod:`request_fields` takes the fields out
of the request, hides them from the view, and writes the answer's headers; :mod:`request_schema` checks them;
:mod:`register` stores endpoint and watch in one transaction before the view runs and confirms the enqueued
jobs after it, for ``enqueue_with_webhook`` and ``watch`` as well. :mod:`tenants` asks the host who calls, and
who subscribed once instead of with each request. :mod:`route_report` says which routes enqueue jobs, and
whether a webhook can go with them.
"""
