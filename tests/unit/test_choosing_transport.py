"""Which transport the settings ask for, and what is said where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.dispatch.http import open_transport
from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.protocol.urls import UrlPolicy
from tests.servers import ROOT
from tests.transports import CLASSES


@pytest.mark.parametrize("name", ["requests", "aiohttp"])
def test_the_setting_names_the_transport(name: str) -> None:
    settings = load_settings({"RQ_WEBHOOKS_TRANSPORT": name}, {})
    with open_transport(settings, UrlPolicy(), concurrency=1) as transport:
        assert type(transport) is CLASSES[name]


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'requests', 'aiohttp'"):
        load_settings({"RQ_WEBHOOKS_TRANSPORT": "httpx"}, {})


def test_without_aiohttp_the_extra_is_named_and_nothing_else_needs_it() -> None:
    program = """
import sys
sys.modules["aiohttp"] = None
from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.dispatch.http import open_transport
from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.protocol.urls import UrlPolicy
open_transport(load_settings({}, {}), UrlPolicy(), concurrency=1).close(wait=True)
try:
    open_transport(load_settings({"RQ_WEBHOOKS_TRANSPORT": "aiohttp"}, {}), UrlPolicy(), concurrency=1)
except ConfigurationError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert "aiohttp is not installed" in done.stdout
    assert "pip install 'flask-rq-webhooks[fast]'" in done.stdout


def test_without_the_compiled_parser_aiohttp_is_refused() -> None:
    program = """
from flask_rq_webhooks.config import load_settings
from flask_rq_webhooks.dispatch.http import open_transport
from flask_rq_webhooks.errors import ConfigurationError
from flask_rq_webhooks.protocol.urls import UrlPolicy
try:
    open_transport(load_settings({"RQ_WEBHOOKS_TRANSPORT": "aiohttp"}, {}), UrlPolicy(), concurrency=1)
except ConfigurationError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
        env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"},
    )
    assert "compiled parser is missing" in done.stdout


@pytest.mark.parametrize("name", CLASSES)
def test_a_transport_that_cannot_be_made_leaves_no_thread(name: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(Exception, match=r".+"):
        CLASSES[name](UrlPolicy(), concurrency=1, proxy_url="http://[::1")
    assert set(threading.enumerate()) <= before
