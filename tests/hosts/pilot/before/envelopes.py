"""What every answer of the service looks like; errors are HTTP 200 with Success false."""

import logging
import traceback

from flask import jsonify, request

logger = logging.getLogger(__name__)


def parse_request_payload():
    """Read a JSON object, else the form; trim texts and collapse lists of one."""
    payload = request.get_json(silent=True)
    if not isinstance(payload, dict):
        payload = request.form.to_dict(flat=False)
    cleaned = {}
    for key, value in payload.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        cleaned[key] = value.strip() if isinstance(value, str) else value
    return cleaned


def success_factory(**content):
    return jsonify({"Success": True, **content})


def error_factory(message):
    return jsonify({"Success": False, "Error": message})


def exception_factory(message):
    logger.exception(message)
    return jsonify({"Success": False, "Error": message, "StackTrace": traceback.format_exc().split("\n")})
