"""The receiver's side: what verifies, what does not, and that nothing but SignatureError is raised."""

from __future__ import annotations

import base64
import email.message
import hashlib
import hmac
import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NoReturn

import flask
import pytest
import standardwebhooks
import svix.webhooks
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.datastructures import Headers

from flask_rq_webhooks.errors import SignatureError
from flask_rq_webhooks.protocol.signatures import (
    SigningKey,
    body_signature,
    signature_headers,
    standard_signature,
)
from flask_rq_webhooks.receiver import VerifiedWebhook, verified_webhook, verify

# The vector published with Standard Webhooks and by Svix.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
T = 1614265330
BODY = b'{"test": 2432232314}'
V1 = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
SHA = body_signature(SECRET, BODY)
OTHER = standard_signature("another", ID, T, BODY)
STANDARD = {"webhook-id": ID, "webhook-timestamp": str(T), "webhook-signature": V1}
PLAIN = {"X-Webhook-Signature": SHA, "X-Webhook-Timestamp": str(T)}


def shown(value: object) -> str:
    """Return a test id that is the same in every process: without memory addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def check(headers: Any, body: Any = BODY, secrets: Any = SECRET, **options: Any) -> VerifiedWebhook:
    return verify(body, headers, secrets, **{"now": T, "schemes": ("v1", "sha256"), **options})


def refuse(headers: Any, body: Any = BODY, secrets: Any = SECRET, **options: Any) -> str:
    with pytest.raises(SignatureError) as caught:
        check(headers, body, secrets, **options)
    return str(caught.value)


# -- what verifies ---------------------------------------------------------------------------------------


def test_the_published_vector() -> None:
    webhook = check(STANDARD)
    assert webhook == VerifiedWebhook(ID, datetime(2021, 2, 25, 15, 2, 10, tzinfo=UTC), BODY, "v1")
    assert webhook.json == {"test": 2432232314}
    assert "2432232314" not in repr(webhook)


def test_all_we_send_together() -> None:
    webhook = check(
        {**STANDARD, **PLAIN, "Content-Type": "application/json", "X-Webhook-Event": "job.success"}
    )
    assert webhook.scheme == "v1"


@pytest.mark.parametrize(
    "headers",
    [
        STANDARD,
        {name.title(): value for name, value in STANDARD.items()},
        {name.upper(): value for name, value in STANDARD.items()},
        {name.encode(): value.encode() for name, value in STANDARD.items()},
        list(STANDARD.items()),
        [(name.encode(), value.encode()) for name, value in STANDARD.items()],
        iter(STANDARD.items()),
        Headers(list(STANDARD.items())),
        [
            *STANDARD.items(),
            (5, 5),
            (None, None),
            ("x", object()),
            ("webhoo\u212a-id", "k"),
            (b"\xff", b"\xff"),
        ],
    ],
    ids=["dict", "title", "upper", "bytes", "pairs", "asgi", "iterator", "werkzeug", "odd-others"],
)
def test_kinds_of_headers(headers: Any) -> None:
    assert check(headers).id == ID


def test_an_email_message_as_http_client_gives_it() -> None:
    message = email.message.Message()
    for name, value in STANDARD.items():
        message[name] = value
    assert check(message).id == ID


@pytest.mark.parametrize(
    "body", [BODY, bytearray(BODY), memoryview(BODY), BODY.decode()], ids=lambda b: type(b).__name__
)
def test_kinds_of_bodies(body: Any) -> None:
    webhook = check(STANDARD, body)
    assert type(webhook.body) is bytes
    assert webhook.body == BODY
    assert check(PLAIN, body).body == BODY


def test_bodies_that_are_no_text() -> None:
    body = b"\xff\x00\xfe"
    webhook = check({**STANDARD, "webhook-signature": standard_signature(SECRET, ID, T, body)}, body)
    assert webhook.body == body
    with pytest.raises(ValueError):
        _ = webhook.json


def test_an_empty_body() -> None:
    assert check({**STANDARD, "webhook-signature": standard_signature(SECRET, ID, T, b"")}, b"").body == b""
    assert check({"X-Webhook-Signature": body_signature("s", b"")}, b"", "s").body == b""


@pytest.mark.parametrize(
    "secrets",
    [
        SECRET,
        SECRET.encode(),
        [SECRET],
        ("wrong", SECRET),
        {SECRET},
        iter([b"wrong", SECRET]),
        ["", SECRET, ""],
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_secrets(secrets: Any) -> None:
    assert check(STANDARD, secrets=secrets).id == ID


@pytest.mark.parametrize(
    "signature",
    [
        V1,
        f"{OTHER} {V1}",
        f"{V1} {OTHER}",
        f"v1a,abc v2,{V1[3:]} {V1}",
        f"  {V1} ",
        f"v1, {V1}",
        f"v1 nonsense ,, = v1,,{V1[3:]} {V1}",
        "v1,x " * 500 + V1,
    ],
)
def test_several_entries_malformed_ones_passed_over(signature: str) -> None:
    assert check({**STANDARD, "webhook-signature": signature}).id == ID


@pytest.mark.parametrize("offset", [-300, -299, 0, 299, 300])
def test_ages_within_tolerance(offset: int) -> None:
    assert check(STANDARD, now=T + offset).id == ID
    assert check(PLAIN, now=T + offset).body == BODY


@pytest.mark.parametrize(
    "now",
    [
        T,
        T + 0.5,
        datetime.fromtimestamp(T, UTC),
        datetime.fromtimestamp(T, timezone(timedelta(hours=-8))),
        datetime.fromtimestamp(T, UTC).replace(tzinfo=None),
    ],
    ids=shown,
)
def test_kinds_of_now(now: Any) -> None:
    assert check(STANDARD, now=now).id == ID


def test_tolerance_is_the_callers() -> None:
    assert check(STANDARD, now=T + 3600, tolerance=3600).id == ID
    assert check(STANDARD, now=T + 10**9, tolerance=float("inf")).id == ID
    assert check(STANDARD, tolerance=0).id == ID
    assert "too old" in refuse(STANDARD, now=T + 1, tolerance=0)


def test_the_clock_of_the_machine_is_the_default() -> None:
    now = int(datetime.now(UTC).timestamp())
    headers = {
        "webhook-id": "e",
        "webhook-timestamp": str(now),
        "webhook-signature": standard_signature("s", "e", now, b"{}"),
    }
    assert verify(b"{}", headers, "s").id == "e"
    with pytest.raises(SignatureError, match="too old"):
        verify(BODY, STANDARD, SECRET)


# -- sha256= ---------------------------------------------------------------------------------------------


def test_sha256_alone_vouches_for_nothing_but_the_body() -> None:
    expected = VerifiedWebhook(None, None, BODY, "sha256")
    assert check(PLAIN) == expected
    assert check({"X-Webhook-Signature": SHA}) == expected
    assert check({**PLAIN, "webhook-id": "claimed", "webhook-timestamp": str(T)}) == expected
    assert check({"x-webhook-signature": SHA}, secrets=["wrong", SECRET]) == expected


def test_sha256_as_other_senders_compute_it() -> None:
    digest = hmac.new("gehei\u00df".encode(), BODY, hashlib.sha256).hexdigest()
    assert check({"X-Webhook-Signature": f"sha256={digest}"}, secrets="gehei\u00df").body == BODY
    assert check({"X-Webhook-Signature": f"sha256={digest}"}, secrets="gehei\u00df".encode()).body == BODY


@pytest.mark.parametrize("moment", ["2021-02-25T15:02:10Z", "2021-02-25T15:02:10.123456Z", str(T)])
def test_another_prefix_and_iso_timestamps(moment: str) -> None:
    headers = {"X-Guardrails-Signature": SHA, "X-Guardrails-Timestamp": moment}
    assert check(headers, header_prefix="X-Guardrails").scheme == "sha256"
    assert check(headers, header_prefix="x-guardrails").scheme == "sha256"
    assert "X-Webhook-Signature" in refuse(headers)


@pytest.mark.parametrize(
    "moment",
    [
        "", "x", str(T - 301), str(T + 301), f" {T}", f"+{T}", f"0{T}", "2021-02-25T14:02:10Z",
        "2021-02-25T15:02:10",
        "2021-02-25 15:02:10Z", "2021-02-25T15:02:10+00:00", "2021-13-25T15:02:10Z", "2021-02-25T15:02:10z",
        "2021-W08-4T15:02:10Z", "2021-02-25T15:02:10.1234567Z",
    ],
)  # fmt: skip
def test_a_timestamp_that_comes_with_sha256_must_be_right(moment: str) -> None:
    refuse({**PLAIN, "X-Webhook-Timestamp": moment})


def test_the_standard_timestamp_counts_with_sha256_too() -> None:
    assert "too old" in refuse({"X-Webhook-Signature": SHA, "webhook-timestamp": str(T - 301)})
    refuse({"X-Webhook-Signature": SHA, "webhook-timestamp": "2021-02-25T15:02:10Z"})


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "sha256=",
        "sha256",
        SHA[7:],
        SHA[:-1],
        SHA[:-1] + ("0" if SHA[-1] != "0" else "1"),
        SHA + "0",
        SHA + " ",
        " " + SHA,
        SHA + "\n",
        SHA.upper(),
        "SHA256=" + SHA[7:],
        "sha256=" + SHA[7:].upper(),
        "sha256=" + SHA,
        "sha256=0x" + SHA[7:],
        "sha256 =" + SHA[7:],
        "sha256=" + " ".join(SHA[7:]),
        "sha1=" + SHA[7:],
        "v1," + SHA[7:],
        V1,
        f"{SHA} {SHA}",
        f"{SHA},{SHA}",
        f"{SHA};t=1",
        "sha256=" + "0" * 64,
        "sha256=" + base64.b64encode(bytes.fromhex(SHA[7:])).decode(),
        SHA.replace("0", "\uff10").replace("1", "\u0661"),
        "sha256=\ud800",
    ],
    ids=ascii,
)
def test_sha256_that_is_not_spelled_so(signature: str) -> None:
    refuse({"X-Webhook-Signature": signature})


# -- what does not verify --------------------------------------------------------------------------------


def test_a_wrong_webhook_signature_is_not_saved_by_a_right_sha256() -> None:
    refuse({**STANDARD, **PLAIN, "webhook-signature": OTHER})
    refuse({**STANDARD, **PLAIN, "webhook-signature": ""})
    refuse({**STANDARD, **PLAIN, "webhook-signature": "v2,abc"})
    refuse({**STANDARD, **PLAIN}, now=T + 301)


def test_by_default_a_signature_must_cover_a_time() -> None:
    with pytest.raises(SignatureError, match="covers no time.*schemes="):
        verify(BODY, PLAIN, SECRET, now=T)
    assert verify(BODY, STANDARD | PLAIN, SECRET, now=T).scheme == "v1"
    assert verify(BODY, PLAIN, SECRET, now=T, schemes=("sha256",)).scheme == "sha256"


def test_whole_header_names() -> None:
    headers = {"Guard-Sig": SHA, "Guard-Time": str(T)}
    options = {"signature_header": "guard-sig", "timestamp_header": "Guard-Time"}
    assert check(headers, **options).scheme == "sha256"
    assert "too old" in refuse(headers, **options, now=T + 301)
    assert "no Guard-Sig header" in refuse(PLAIN, schemes=("sha256",), signature_header="Guard-Sig")


# -- v1a --------------------------------------------------------------------------------------------------

# The pair of keys that Svix's documentation and libraries use in their tests.
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="


def by_key(text: str = PRIVATE, **changed: str) -> dict[str, str]:
    entry = SigningKey(text).signature(ID, T, BODY)
    return {"webhook-id": ID, "webhook-timestamp": str(T), "webhook-signature": entry, **changed}


def test_a_public_key_verifies_what_the_private_one_signed() -> None:
    webhook = verify(BODY, by_key(), PUBLIC, now=T)
    assert (webhook.id, webhook.scheme) == (ID, "v1a")
    both = by_key(**{"webhook-signature": f"{V1} {by_key()['webhook-signature']}"})
    assert verify(BODY, both, [SigningKey.generate().public, PUBLIC], now=T).scheme == "v1a"
    assert verify(BODY, both, SECRET, now=T).scheme == "v1"
    assert verify(BODY, both, [PUBLIC], now=T, schemes=("v1a",)).scheme == "v1a"


@pytest.mark.parametrize(
    "headers",
    [
        by_key(**{"webhook-id": "msg_other"}),
        by_key(**{"webhook-timestamp": str(T + 1)}),
        by_key(**{"webhook-signature": by_key()["webhook-signature"].rstrip("=")}),
        by_key(**{"webhook-signature": by_key()["webhook-signature"].replace("v1a,", "v1,")}),
        by_key(**{"webhook-signature": "v1a,"}),
        by_key(**{"webhook-signature": "v1a,\xe9"}),
        by_key(SigningKey.generate().text),
        by_key(**{"webhook-signature": " ".join(["v1a,AAAA"] * 9 + [by_key()["webhook-signature"]])}),
    ],
    ids=["id", "time", "padding", "scheme", "empty", "not ascii", "another key", "tenth entry"],
)
def test_a_v1a_signature_that_is_not_right(headers: dict[str, str]) -> None:
    with pytest.raises(SignatureError):
        verify(BODY, headers, PUBLIC, now=T)


def test_a_public_key_is_no_shared_secret() -> None:
    # Everybody knows it: a signature made with it proves nothing.
    forged = {**STANDARD, "webhook-signature": standard_signature(PUBLIC, ID, T, BODY)}
    assert "No signature" in refuse(forged, secrets=PUBLIC)
    assert "No signature" in refuse({"X-Webhook-Signature": body_signature(PUBLIC, BODY)}, secrets=PUBLIC)
    assert "public key is malformed" in refuse(by_key(), secrets="whpk_AAAA", schemes=("v1a",))
    assert "verify with the public key" in refuse(by_key(), secrets=PRIVATE, schemes=("v1a",))


def test_a_wrong_sha256_does_not_spoil_a_right_webhook_signature() -> None:
    # During a rotation it is made with the newest secret, which this receiver may not know yet.
    assert check({**STANDARD, "X-Webhook-Signature": body_signature("newer", BODY)}).scheme == "v1"


def test_schemes() -> None:
    assert check(STANDARD, schemes=("v1",)).scheme == "v1"
    assert "covers no time" in refuse(PLAIN, schemes=("v1",))
    assert refuse({}, schemes=("v1",)) == "The webhook has no webhook-signature header."
    assert check({**STANDARD, **PLAIN}, schemes=("sha256",)).scheme == "sha256"
    assert refuse(STANDARD, schemes=("sha256",)) == "The webhook has no X-Webhook-Signature header."
    assert refuse({}) == "The webhook has no webhook-signature and no X-Webhook-Signature header."


DIGEST = V1[3:]


@pytest.mark.parametrize(
    "signature",
    [
        "",
        " ",
        ",",
        "v1",
        "v1,",
        "v1,=",
        "v1,====",
        "v1 " + DIGEST,
        "v1=" + DIGEST,
        "v1:" + DIGEST,
        DIGEST,
        "," + DIGEST,
        "v1a," + DIGEST,
        "v11," + DIGEST,
        "v2," + DIGEST,
        "v," + DIGEST,
        "V1," + DIGEST,
        "v1,," + DIGEST,
        "v1, " + DIGEST,
        "v1," + V1,
        "v1v1," + DIGEST,
        # padding games: other spellings of the same bytes
        V1.rstrip("="),
        V1 + "=",
        V1 + "==",
        "v1,=" + DIGEST,
        V1[:-2] + "F=",
        V1[:-2] + "G=",
        V1[:-1] + "\n=",
        V1.replace("+", "-").replace("/", "_"),
        V1.replace("+", "%2B"),
        V1 + "\n",
        V1 + "\r\n",
        V1 + "\t",
        V1 + "\x00",
        "\ufeff" + V1,
        V1 + "\u00a0",
        V1.replace("g", "\uff47"),
        V1 + "AAAA",
        V1[:-4],
        V1.swapcase(),
        V1.lower(),
        V1 + ",v1",
        V1 + "," + OTHER,
        V1 + ", " + OTHER,
        V1 + ";" + OTHER,
        f'"{V1}"',
        "v1," + base64.b64encode(bytes(32)).decode(),
        "v1," + SHA[7:],
        SHA,
        OTHER,
        "\ud800",
        "v1," + "A" * 100_000,
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_signatures_that_are_not_spelled_so(signature: str) -> None:
    refuse({**STANDARD, "webhook-signature": signature})


@pytest.mark.parametrize(
    "timestamp",
    [
        "", " ", f" {T}", f"{T} ", f"+{T}", f"-{T}", f"0{T}", f"00{T}", f"{T}.0", f"{T}.", f"{T}e0",
        "1.614265330e9",
        f"{T}\n", f"{T}\x00", "1_614_265_330", "1,614,265,330", hex(T), oct(T), "nan", "inf", "-0", "+0",
        "".join(chr(0x660 + int(digit)) for digit in str(T)),
        "".join(chr(0xFF10 + int(digit)) for digit in str(T)),
        f"{T}\u00b2", "9" * 13, "9" * 5000, "2021-02-25T15:02:10Z", "None", f"{T},{T}", f"{T * 1000}",
    ],
    ids=lambda text: ascii(text)[:40],
)  # fmt: skip
def test_timestamps_that_are_not_canonical(timestamp: str) -> None:
    # Signed as it is spelled, so that nothing but the spelling is wrong.
    signed = f"{ID}.{timestamp}.".encode() + BODY
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signature = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    refuse({**STANDARD, "webhook-timestamp": timestamp, "webhook-signature": signature})


@pytest.mark.parametrize("offset", [301, 300.5, 10**6, -301, -300.5, -(10**6)])
def test_ages_beyond_tolerance(offset: float) -> None:
    message = refuse(STANDARD, now=T + offset)
    assert ("too old" if offset > 0 else "too new") in message
    refuse(PLAIN, now=T + offset)


def test_a_timestamp_of_zero_is_one() -> None:
    headers = {
        **STANDARD,
        "webhook-timestamp": "0",
        "webhook-signature": standard_signature(SECRET, ID, 0, BODY),
    }
    assert check(headers, now=0).timestamp == datetime(1970, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("missing", STANDARD)
def test_missing_headers(missing: str) -> None:
    assert missing in refuse({name: value for name, value in STANDARD.items() if name != missing})


@pytest.mark.parametrize(
    "event_id", ["", " ", "a b", "a\n", "\u00e9", "a.1", "msg\x00", "x" * 257, "\ud800"], ids=ascii
)
def test_ids_that_are_malformed(event_id: str) -> None:
    signed = f"{event_id}.{T}.".encode("utf-8", "surrogatepass") + BODY
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signature = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    refuse({**STANDARD, "webhook-id": event_id, "webhook-signature": signature})


def test_the_id_cannot_take_over_the_timestamp() -> None:
    # "e", 1, "2.x" and "e.1", 2, "x" are the same bytes once joined.
    signature = standard_signature(SECRET, "e", 1, b"2.x")
    assert signature == standard_signature(SECRET, "e.1", 2, b"x")
    headers = {"webhook-id": "e.1", "webhook-timestamp": "2", "webhook-signature": signature}
    refuse(headers, b"x", now=2)


@pytest.mark.parametrize("name", [*STANDARD, "X-Webhook-Signature", "x-webhook-timestamp"])
@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_headers_that_come_twice(name: str, same: bool) -> None:
    pairs = [*STANDARD.items(), *PLAIN.items()]
    value = dict(pairs).get(name, str(T)) if same else "other"
    assert "twice" in refuse([*pairs, (name.swapcase(), value)])
    assert "twice" in refuse([(name, value), *pairs])
    assert "twice" in refuse({**dict(pairs), name.upper(): value, name.lower(): value})


@pytest.mark.parametrize(
    "value", [None, 5, 1.5, True, [V1], (V1,), {}, object(), b"\xff", bytearray(V1.encode())], ids=shown
)
def test_values_that_are_no_text(value: Any) -> None:
    for name in STANDARD:
        refuse({**STANDARD, name: value})
    refuse({"X-Webhook-Signature": value})


@pytest.mark.parametrize("position", range(len(BODY)))
def test_every_byte_of_the_body_counts(position: int) -> None:
    changed = bytes([*BODY[:position], BODY[position] ^ 1, *BODY[position + 1 :]])
    refuse(STANDARD, changed)
    refuse(PLAIN, changed)


@pytest.mark.parametrize("position", range(3, len(V1)))
def test_every_character_of_the_signature_counts(position: int) -> None:
    for other in "A+/=0z":
        if V1[position] != other:
            refuse({**STANDARD, "webhook-signature": V1[:position] + other + V1[position + 1 :]})


def test_id_and_timestamp_are_covered() -> None:
    refuse({**STANDARD, "webhook-id": ID + "x"})
    refuse({**STANDARD, "webhook-timestamp": str(T + 1)})


@pytest.mark.parametrize(
    "secrets",
    [
        "", b"", [], (), [""], [b"", ""], None, 5, [None], [5], {}, {SECRET: 1}, "wrong", SECRET[:-1],
        SECRET.lower(), object(), [SECRET, None],
        SECRET.removeprefix("whsec_"), f" {SECRET}", f"{SECRET}\n", [[SECRET]], "whsec_", "\ud800",
    ],
    ids=shown,
)  # fmt: skip
def test_secrets_that_do_not_fit(secrets: Any) -> None:
    refuse(STANDARD, secrets=secrets)
    refuse({"X-Webhook-Signature": SHA}, secrets=secrets)


def test_nobody_signs_with_an_empty_secret() -> None:
    digest = hmac.new(b"", f"{ID}.{T}.".encode() + BODY, hashlib.sha256).digest()
    forged = {**STANDARD, "webhook-signature": "v1," + base64.b64encode(digest).decode()}
    plain = {"X-Webhook-Signature": "sha256=" + hmac.new(b"", BODY, hashlib.sha256).hexdigest()}
    for secrets in ("", b"", [""], ["", "x"], "whsec_", "whsec_===="):
        refuse(forged, secrets=secrets)
        refuse(plain, secrets=secrets)


@pytest.mark.parametrize(
    "body", [None, 5, {"test": 1}, [1], object(), "\ud800", BODY.decode() + "\n"], ids=shown
)
def test_bodies_that_are_none(body: Any) -> None:
    refuse(STANDARD, body)


def explode(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("boom")


class Hostile:
    items = __iter__ = __len__ = __bytes__ = __float__ = __str__ = lower = explode


class HostileText(str):
    encode = lower = split = isascii = __hash__ = __eq__ = explode


@pytest.mark.parametrize(
    "headers",
    [
        None,
        5,
        "text",
        b"bytes",
        [1],
        [("a",)],
        [("a", "b", "c")],
        object(),
        Hostile(),
        [HostileText("webhook-id")],
    ],
    ids=lambda value: type(value).__name__,
)
def test_headers_that_are_none(headers: Any) -> None:
    refuse(headers)


@pytest.mark.parametrize(
    "options",
    [
        {"now": "soon"}, {"now": float("nan")}, {"now": float("inf")}, {"now": Hostile()},
        {"now": datetime.min},
        {"tolerance": None}, {"tolerance": "300"}, {"tolerance": float("nan")}, {"tolerance": -1},
        {"header_prefix": None}, {"schemes": None}, {"schemes": ()}, {"schemes": 5},
    ],
    ids=shown,
)  # fmt: skip
def test_wrong_arguments_refuse_rather_than_accept_or_crash(options: dict[str, Any]) -> None:
    refuse(STANDARD, **options)


anything: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.datetimes()
    | st.builds(Hostile)
    | st.sampled_from([*STANDARD, *PLAIN, V1, SHA, SECRET, str(T)]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.lists(st.tuples(inner, inner), max_size=4)
        | st.dictionaries(st.text() | st.sampled_from([*STANDARD, *PLAIN]), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(anything, anything, anything, anything, anything)
def test_nothing_else_is_ever_raised(body: Any, headers: Any, secrets: Any, tolerance: Any, now: Any) -> None:
    with pytest.raises(SignatureError):
        verify(body, headers, secrets, tolerance=tolerance, now=now)


header_text = st.text(st.characters(), max_size=60) | st.sampled_from(
    [V1, SHA, ID, str(T), "v1,", "sha256=", ""]
)


@example(ID, str(T), V1, "\x1f")
@given(header_text, header_text, header_text, header_text)
def test_mutated_headers(event_id: str, timestamp: str, signature: str, plain: str) -> None:
    headers = {
        "webhook-id": event_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": signature,
        "X-Webhook-Signature": plain,
    }
    good = event_id == ID and timestamp == str(T) and V1 in signature.split(" ")
    # A damaged header of ours is refused even where another one counts, like one that comes twice.
    good = good and plain.isascii() and plain.isprintable()
    try:
        assert check(headers).id == ID
        assert good
    except SignatureError:
        assert not good


# -- against the official libraries ----------------------------------------------------------------------


def official(secret: str) -> str:
    """Return the secret as the official libraries want it: base64 behind ``whsec_``."""
    return secret if secret.startswith("whsec_") else "whsec_" + base64.b64encode(secret.encode()).decode()


@pytest.mark.parametrize(
    "secret",
    ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "plain", "gehei\u00df", "x", "y" * 512],
    ids=lambda s: ascii(s)[:20],
)
@pytest.mark.parametrize(
    "library", [standardwebhooks.Webhook, svix.webhooks.Webhook], ids=["standardwebhooks", "svix"]
)
def test_official_libraries_and_we_agree(secret: str, library: Any) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    timestamp = int(now.timestamp())
    text = '{"event":"job.success","result":"gr\\u00fcn"}'
    ours = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(timestamp),
        **signature_headers(
            ["older", secret],
            event_id="evt_1",
            timestamp=timestamp,
            body=text.encode(),
            header_prefix="X-Webhook",
            iso_timestamp=False,
        ),
    }
    library(official(secret)).verify(text, ours)
    theirs = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(timestamp),
        "webhook-signature": library(official(secret)).sign("evt_1", now, text),
    }
    assert verify(text, theirs, secret).json["event"] == "job.success"
    assert verify(text, theirs, official(secret)).id == "evt_1"
    with pytest.raises(Exception, match="No matching signature"):
        library(official("another")).verify(text, ours)


# -- the decorator ---------------------------------------------------------------------------------------


@pytest.fixture
def hooks() -> flask.Flask:
    application = flask.Flask(__name__)
    application.config["SECRETS"] = [SECRET]

    @application.post("/sync/<place>")
    @verified_webhook(lambda: flask.current_app.config["SECRETS"], tolerance=float("inf"))
    def sync_hook(place: str) -> dict[str, Any]:
        """Docstring of the view."""
        return {"id": flask.g.webhook.id, "json": flask.g.webhook.json, "place": place}

    @application.post("/async/<place>")
    @verified_webhook(iter([SECRET]), tolerance=float("inf"))
    async def async_hook(place: str) -> dict[str, Any]:
        return {"id": flask.g.webhook.id, "json": flask.request.get_json(), "place": place}

    @application.post("/fresh")
    @verified_webhook(SECRET, schemes=("v1",))
    def fresh_hook() -> str:
        return "never"

    assert sync_hook.__name__ == "sync_hook"
    assert sync_hook.__doc__ == "Docstring of the view."
    return application


@pytest.mark.parametrize("path", ["/sync/a", "/async/a"])
def test_decorated_views(hooks: flask.Flask, path: str) -> None:
    client = hooks.test_client()
    for _ in range(2):
        answer = client.post(path, data=BODY, headers=STANDARD, content_type="application/json")
        assert (answer.status_code, answer.json) == (
            200,
            {"id": ID, "json": {"test": 2432232314}, "place": "a"},
        )
    refused = client.post(path, data=BODY + b" ", headers=STANDARD)
    assert (refused.status_code, refused.json) == (
        401,
        {
            "error": {
                "code": "invalid_signature",
                "message": "No signature of the webhook fits the body and a known secret.",
                "details": {},
            }
        },
    )
    assert client.post(path, data=BODY).status_code == 401


def test_a_callable_is_asked_for_every_request(hooks: flask.Flask) -> None:
    client = hooks.test_client()
    hooks.config["SECRETS"] = "rotated"
    assert client.post("/sync/a", data=BODY, headers=STANDARD).status_code == 401
    hooks.config["SECRETS"] = ["rotated", SECRET]
    assert client.post("/sync/a", data=BODY, headers=STANDARD).status_code == 200


def test_options_reach_verify(hooks: flask.Flask) -> None:
    client = hooks.test_client()
    old = client.post("/fresh", data=BODY, headers=STANDARD)
    assert old.json is not None
    assert old.json["error"]["message"] == "The webhook's timestamp is too old."
    assert client.post("/fresh", data=BODY, headers={"X-Webhook-Signature": SHA}).status_code == 401


def test_the_module_needs_the_standard_library_only() -> None:
    code = (
        "import sys\n"
        "for name in ('flask', 'werkzeug', 'rq', 'redis', 'sqlalchemy', 'requests', 'cryptography'):\n"
        "    sys.modules[name] = None\n"
        "from flask_rq_webhooks.receiver import verify\n"
        f"import json; print(json.dumps(verify({BODY!r}, {STANDARD!r}, {SECRET!r}, now={T}).json))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == {"test": 2432232314}
