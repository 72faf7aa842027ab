"""What people and API clients see: the only Flask views of the package, apart from the decorator's.

:mod:`operations` has one function per action of an operator or a customer; the other modules translate.
:mod:`blueprint` mounts the routes and decides who has access. For programs: :mod:`api` has the routes,
:mod:`api_contract` what they have in common (permission, input, response, errors, OpenAPI),
:mod:`api_schemas` the schemas, :mod:`job_status` what the client of one job may know, :mod:`monitoring`
alarms and metrics. For people: :mod:`pages` and :mod:`endpoint_pages` in the layout of :mod:`page_frame`,
with :mod:`forms` and :mod:`formatting`. Rows are read and changed through ``storage``; nothing is sent here.
"""
