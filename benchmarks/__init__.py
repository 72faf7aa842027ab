"""What the pipeline costs, compared with the alternatives. ``python -m benchmarks --help``.

Every benchmark starts its own servers (Valkey, PostgreSQL, receivers, workers, dispatchers), warms up, and
runs its contenders alternately, so that whatever else the machine does meets all of them. Ratios are
therefore worth more than the figures they are made of.
"""
