"""Who is calling: bearer tokens, one for users and one for operators."""

import functools
import os
import secrets

from flask import request


def actor():
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    for name in ("operator", "user"):
        if secrets.compare_digest(given.encode(), os.environ[f"{name.upper()}_TOKEN"].encode()):
            return name
    return None


def requires_token(view):
    @functools.wraps(view)
    def wrapper(*args, **kwargs):
        if actor() is None:
            return {"Success": False, "Error": "token required"}, 401
        return view(*args, **kwargs)

    return wrapper
