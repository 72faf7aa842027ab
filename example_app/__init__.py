"""A small watershed-modelling service whose clients are told by webhook how their jobs ended.

=================  ==============================================================================
``model``          a daily water balance: pure functions on the tables in ``data/``
``jobs``           what RQ workers run; needs neither Flask nor SQL
``app``            the host: a module-level Flask app with routes that enqueue those jobs
``analysis``       a second service, with the ``task`` payload format and its own header names
``receiver``       a client's side: verifies what arrives and shows it
``serve``          runs one of the Flask apps on a port the kernel chooses
``valkey``         runs an embedded Valkey on a Unix socket
``demo``           ``make demo``: all of it together, once
=================  ==============================================================================
"""
