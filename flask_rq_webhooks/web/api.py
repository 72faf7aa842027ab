"""The JSON API: the status of one job's webhook for clients, and everything for operators.

Owns the blueprint, the routes, and the shape of their answers and errors. Who may call is decided in
:mod:`.permissions`; what is read and changed, in ``storage``.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

from ..errors import StorageUnavailableError
from ..state import State
from ..storage.dispatchers import dispatcher_alive


def create_blueprint(state: State) -> Blueprint:
    """Return the blueprint of one app, mounted at ``URL_PREFIX``."""
    blueprint = Blueprint("rq_webhooks", __name__, url_prefix=state.settings.url_prefix)

    @blueprint.get("/health")
    def health() -> Any:
        try:
            ok = dispatcher_alive(state.database)
        except StorageUnavailableError:
            ok = False
        return {"ok": ok}, 200 if ok else 503

    return blueprint
