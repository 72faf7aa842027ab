"""What people and API clients see: the only Flask views of the package, apart from the decorator's.

:mod:`operations` has one function per action of an operator or a customer; everything else translates.
:mod:`blueprint` mounts the routes and decides who is admitted. For programs: :mod:`api` has the routes,
:mod:`api_contract` what they have in common (permission, input, answer, refusal, OpenAPI), :mod:`api_schemas`
the shapes, :mod:`job_status` what the client of one job may know, :mod:`monitoring` alarms and metrics. For
people: :mod:`pages` and :mod:`endpoint_pages` in the frame of :mod:`page_frame`, with :mod:`forms` and
:mod:`formatting`. Reads and changes rows through ``storage``; sends nothing itself.
"""
