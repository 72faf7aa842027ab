"""A small watershed-modelling service that reports the end of its jobs to clients by webhook.

=================  ==============================================================================
``model``          a daily water balance: pure functions on the tables in ``data/``
``jobs``           what RQ workers run; needs neither Flask nor SQL
``app``            the host: a module-level Flask app with routes that enqueue those jobs
``home``           its front page: submit a job and watch its webhook
``analysis``       a second service, with the ``task`` payload format and its own header names
``receiver``       a client's side: verifies and shows what arrives
``serve``          runs one of the Flask apps on a free port
``valkey``         runs an embedded Valkey on a Unix socket
``demo``           ``make demo``: all of it together
=================  ==============================================================================
"""
