"""The receivers in the documentation, run as they are and sent real requests."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from flask_rq_webhooks.protocol.signatures import signature_headers
from flask_rq_webhooks.receiver import verify
from tests.servers import ROOT, Process

EXAMPLES = ROOT / "docs" / "receivers"
COMMANDS = {
    "python": ("python", str(EXAMPLES / "receiver.py")),
    "node": ("node", str(EXAMPLES / "receiver.js")),
}
SECRETS = ["plain secret \u00fc", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_not base64"]
BODY = b'{"event":"job.success","result":"gr\\u00fcn","x":"\xc3\xa9"}'

Start = Callable[..., "Example"]


class Example:
    """One running example."""

    def __init__(self, process: Process) -> None:
        self.process = process
        process.wait_for_output("listening on ")
        (self.url,) = re.findall(r"listening on (\S+)", process.output)

    @property
    def handled(self) -> list[str]:
        """Return the events it has printed."""
        lines = self.process.output.splitlines()
        return [json.loads(line)["event"] for line in lines if line.startswith("{")]

    def post(self, headers: dict[str, str], body: bytes = BODY) -> int:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may refuse a body without reading it
                connection.request("POST", "/", body, headers)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(params=sorted(COMMANDS))
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    if request.param == "node" and shutil.which("node") is None:
        pytest.skip("node is not installed")
    started: list[Process] = []

    def run(**env: str) -> Example:
        started.append(Process(*COMMANDS[request.param], env={"PORT": "0", **env}))
        return Example(started[-1])

    yield run
    for process in started:
        process.stop()


def signed(*secrets: str, body: bytes = BODY, event_id: str = "evt_1", offset: int = 0) -> dict[str, str]:
    """Return the headers the dispatcher would send."""
    timestamp = int(time.time()) + offset
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        **signature_headers(
            secrets,
            event_id=event_id,
            timestamp=timestamp,
            body=body,
            header_prefix="X-Webhook",
            iso_timestamp=False,
        ),
    }


@pytest.mark.parametrize("secret", SECRETS)
def test_genuine_webhooks_are_handled_once(start: Start, secret: str) -> None:
    example = start(WEBHOOK_SECRET=secret)
    assert example.post(signed(secret)) == 204
    assert example.post(signed("rotated", secret)) == 204
    assert example.post(signed(secret, event_id="evt_2")) == 204
    assert example.handled == ["job.success", "job.success"]


def test_the_old_secret_still_counts(start: Start) -> None:
    example = start(WEBHOOK_SECRET="new", WEBHOOK_OLD_SECRET="old")
    assert example.post(signed("old")) == 204
    assert example.post(signed("new", event_id="evt_2")) == 204
    assert example.post(signed("older", event_id="evt_3")) == 401


def test_others_are_refused(start: Start) -> None:
    example = start(WEBHOOK_SECRET="right")
    good = signed("right")
    refused = [
        signed("wrong"),
        signed("right", offset=-301),
        signed("right", offset=310),
        signed("right", body=b"{}"),
        {},
        {**good, "webhook-id": "evt_2"},
        {**good, "webhook-id": ""},
        {**good, "webhook-timestamp": "+" + good["webhook-timestamp"]},
        {**good, "webhook-timestamp": "soon"},
        {**good, "webhook-signature": ""},
        {**good, "webhook-signature": "v1,"},
        {**good, "webhook-signature": good["webhook-signature"].rstrip("=")},
        {**good, "webhook-signature": "v1,\xe9\xe9"},
        {name: value for name, value in good.items() if name != "webhook-signature"},
    ]
    assert [example.post(headers) for headers in refused] == [401] * len(refused)
    assert example.handled == []
    large = b"x" * (1024 * 1024 + 1)
    assert example.post({**signed("right", body=large), "Connection": "close"}, large) == 413
    assert example.post(good) == 204


def test_it_says_what_it_needs(start: Start) -> None:
    with pytest.raises(AssertionError, match="Set WEBHOOK_SECRET"):
        start()


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def sign_sh(*arguments: str, secret: str, body: bytes = BODY) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(EXAMPLES / "sign.sh"), *arguments],
        input=body,
        capture_output=True,
        env={**os.environ, "WEBHOOK_SECRET": secret, "no_proxy": "127.0.0.1"},
        timeout=30,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@needs_openssl
@pytest.mark.parametrize("secret", SECRETS[:2])
def test_what_the_shell_signs_verifies(secret: str) -> None:
    now = str(int(time.time()))
    signature = sign_sh("sign", "evt_1", now, secret=secret).stdout.strip()
    headers = {"webhook-id": "evt_1", "webhook-timestamp": now, "webhook-signature": signature}
    assert verify(BODY, headers, secret).id == "evt_1"


@needs_openssl
@pytest.mark.parametrize("secret", SECRETS[:2])
def test_the_shell_verifies_what_we_sign(secret: str) -> None:
    headers = signed("another", secret)
    given = (headers["webhook-id"], headers["webhook-timestamp"], headers["webhook-signature"])
    genuine = sign_sh("verify", *given, secret=secret)
    assert (genuine.stdout, genuine.returncode) == ("verified\n", 0)
    changed = sign_sh("verify", *given, secret=secret, body=BODY + b"\n")
    assert (changed.stderr, changed.returncode) == ("no signature fits\n", 1)
    headers = signed(secret, offset=-400)
    old = sign_sh(
        "verify", "evt_1", headers["webhook-timestamp"], headers["webhook-signature"], secret=secret
    )
    assert (old.stdout, old.returncode) == ("", 1)


@needs_openssl
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("secret", SECRETS[:2])
def test_the_shell_sends_to_the_examples(start: Start, secret: str) -> None:
    example = start(WEBHOOK_SECRET=secret)
    assert sign_sh("send", example.url, secret=secret).stdout == "204\n"
    assert sign_sh("send", example.url, secret="wrong").stdout == "401\n"
    assert example.handled == ["job.success"]


@needs_openssl
def test_the_simpler_signature_by_openssl() -> None:
    done = subprocess.run(
        ["openssl", "dgst", "-sha256", "-hmac", SECRETS[1]], input=BODY, capture_output=True, check=True
    )
    digest = done.stdout.decode().strip().rpartition(" ")[2]
    assert (
        verify(BODY, {"X-Webhook-Signature": f"sha256={digest}"}, SECRETS[1], schemes=["sha256"]).scheme
        == "sha256"
    )
