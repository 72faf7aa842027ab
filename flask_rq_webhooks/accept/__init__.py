"""Accept webhooks: turn the webhook fields of a request into an endpoint and a watch.

:mod:`decorator` wraps the view and owns the order of the steps. :mod:`request_fields` takes the fields out of
the request, hides them from the view, and writes the response headers; :mod:`request_schema` checks them;
:mod:`register` stores endpoint and watch in one transaction before the view runs and confirms the enqueued
jobs after it, for ``enqueue_with_webhook`` and ``watch`` as well. :mod:`tenants` asks the host app who the
caller is, and whether that tenant subscribed once instead of in each request. :mod:`route_report` tells which
routes enqueue jobs, and whether these jobs can have a webhook.
"""
