"""Ask the installed package for its pages and their static files, as a browser would."""

from __future__ import annotations

import re
import sys

from app import create_app

import flask_rq_webhooks

client = create_app().test_client()
page = client.get("/webhooks/")
assert page.status_code == 200, page.text
assets = sorted(set(re.findall(r'(?:href|src)="(/webhooks/assets/[^"]+)"', page.text)))
for asset in assets:
    answer = client.get(asset)
    assert answer.status_code == 200, asset
    assert answer.data, asset
print(flask_rq_webhooks.__file__)
print(*assets)
sys.exit(0 if assets else "the page names no static files")
