"""The acceptance tests' host app, configured as JSON and with margins as short as a test."""

from __future__ import annotations

import json
import os

from flask import Flask

from flask_rq_webhooks.dispatch import sender
from flask_rq_webhooks.storage import database
from tests.acceptance import host_app


def create_app() -> Flask:
    """Build the app as the environment says."""
    sender.LEASE_MARGIN_S = float(os.environ.get("TEST_LEASE_MARGIN_S", sender.LEASE_MARGIN_S))
    database.IDLE_IN_TRANSACTION_S = int(os.environ.get("TEST_IDLE_S", database.IDLE_IN_TRANSACTION_S))
    return host_app.create_app(json.loads(os.environ["TEST_CONFIG"]))
