"""How the API answers and refuses: error objects, input from the request, headers on everything."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, jsonify, request
from marshmallow import Schema, ValidationError

from ..accept.request_schema import flat_details
from ..errors import RQWebhooksError, StorageUnavailableError
from ..storage.queries import CursorError

logger = logging.getLogger(__name__)

RETRY_UNAVAILABLE_S = 5

#: Bytes of a request to the API; the largest honest one, an endpoint with all its headers, is a tenth of it.
MAX_BODY_BYTES = 256 * 1024
#: Characters of an id in a path; RQ's job ids are the longest.
MAX_ID = 512

_KEY = re.compile("[!-~]{1,255}")


class ApiError(RQWebhooksError):
    """A request to the API is refused.

    :param code: stable, for programs.
    :param details: input field → reasons.
    """

    def __init__(
        self, status: int, code: str, message: str, details: Mapping[str, list[str]] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = dict(details or {})


def not_found(what: str) -> ApiError:
    """Return the refusal for an id that is unknown, or not the caller's to know."""
    return ApiError(404, "not_found", f"There is no such {what}.")


def is_possible_id(text: str) -> bool:
    """Say whether *text*, from a path, may be looked for: databases differ in what they make of the rest."""
    return "\0" not in text and len(text) <= MAX_ID


def error_response(
    status: int, code: str, message: str, details: Mapping[str, Any] | None = None
) -> Response:
    """Return ``{"error": {"code", "message", "details"}}``."""
    response = jsonify({"error": {"code": code, "message": message, "details": dict(details or {})}})
    response.status_code = status
    return response


def query_input(schema: Schema) -> Any:
    """Return the query string, checked.

    :raises ApiError: 400 with every reason.
    """
    values: dict[str, Any] = {}
    for name, items in request.args.lists():
        # A list may be written with commas or by naming its field again.
        values[name] = ",".join(items) if name == "status" else items[-1]
    return _load(schema, values)


def json_input(schema: Schema, *, partial: bool = False) -> Any:
    """Return the JSON object in the body, checked; no body is an empty object.

    :raises ApiError: 400 with every reason; 413 for a huge body, 415 for one that is not JSON.
    """
    values: Any = {}
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise ApiError(413, "too_large", f"At most {MAX_BODY_BYTES} bytes are accepted.")
    if request.get_data():
        if not request.is_json:
            # A form can be sent by another site without asking; JSON cannot.
            raise ApiError(415, "not_json", "Send the body as application/json.")
        try:
            values = request.get_json(silent=True)
        except RecursionError:
            values = None
    if not isinstance(values, dict):
        raise ApiError(400, "invalid", "Expected a JSON object.")
    return _load(schema, values, partial=partial)


def idempotency_key() -> str | None:
    """Return the key by which a client marks a request that it may send again.

    :raises ApiError: 400 for one that is not 1 to 255 visible ASCII characters.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        why = ["Expected 1 to 255 visible ASCII characters."]
        raise ApiError(400, "invalid", "The request is not acceptable.", {"Idempotency-Key": why})
    return key


def _load(schema: Schema, values: Mapping[str, Any], *, partial: bool | None = None) -> Any:
    try:
        return schema.load(values, partial=partial)
    except ValidationError as exc:
        # Without the cause: it holds the values, and one may be a secret.
        raise ApiError(400, "invalid", "The request is not acceptable.", flat_details(exc)) from None


def install(blueprint: Blueprint) -> None:
    """Let *blueprint* answer errors as JSON, and put the safe headers on everything it serves."""

    @blueprint.errorhandler(ApiError)
    def refused(exc: ApiError) -> Response:
        return error_response(exc.status, exc.code, str(exc), exc.details)

    @blueprint.errorhandler(CursorError)
    def bad_cursor(exc: CursorError) -> Response:
        return error_response(400, "invalid", "The request is not acceptable.", {"cursor": [str(exc)]})

    @blueprint.errorhandler(StorageUnavailableError)
    def unavailable(exc: StorageUnavailableError) -> Response:
        logger.error("%s %r could not be answered: %s", request.method, request.path, exc)
        response = error_response(503, "unavailable", "The database cannot be reached now.")
        response.headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
        return response

    @blueprint.after_request
    def safe(response: Response) -> Response:
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        if response.mimetype != "text/html":  # pages say it themselves; a host's error page is the host's
            response.headers.setdefault(
                "Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"
            )
        return response
