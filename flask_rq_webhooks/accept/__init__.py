"""From a request to a promise: the webhook fields of a request become an endpoint and a watch.

:mod:`decorator` surrounds the view; :mod:`request_fields` finds the fields and hides them from the view;
:mod:`request_schema` validates them; :mod:`register` stores endpoint and watch before the view and confirms
the watches after it. :mod:`route_report` lists the routes that enqueue jobs and have no decorator.
"""
