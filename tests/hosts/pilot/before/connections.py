"""Redis: one connection per use, opened and closed around it."""

import os
from contextlib import contextmanager

import redis

TIMEOUT = 216_000


@contextmanager
def redis_connection():
    connection = redis.Redis.from_url(os.environ["REDIS_URL"])
    try:
        yield connection
    finally:
        connection.close()
