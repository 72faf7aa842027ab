"""What follows from an attempt: every status, every error code, the schedule and Retry-After."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_rq_webhooks.config import DEFAULT_RETRY_SCHEDULE, DEFAULT_RETRY_STATUSES
from flask_rq_webhooks.storage.attempts import (
    Decision,
    RetryPolicy,
    error_code_for_status,
    parse_retry_after,
)

NOW = datetime(2024, 1, 1, 12, 0, 0, tzinfo=UTC)
POLICY = RetryPolicy(DEFAULT_RETRY_SCHEDULE, frozenset(DEFAULT_RETRY_STATUSES))


def decide(
    status_code: int | None = None,
    error_code: str | None = None,
    *,
    policy: RetryPolicy = POLICY,
    number: int = 1,
    max_attempts: int = 12,
    retry_after: str | None = None,
    random: float = 0.5,
    retry_4xx: bool = True,
) -> Decision:
    return policy.decide(
        status_code=status_code,
        error_code=error_code,
        number=number,
        max_attempts=max_attempts,
        retry_after=retry_after,
        now=NOW,
        random=lambda: random,
        retry_4xx=retry_4xx,
    )


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
def test_2xx_succeeds(status: int) -> None:
    assert decide(status) == Decision(status="succeeded")
    assert decide(status, number=12) == Decision(status="succeeded")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (408, "http_4xx"),
        (409, "http_4xx"),
        (425, "http_4xx"),
        (429, "http_4xx"),
        (500, "http_5xx"),
        (599, "http_5xx"),
    ],
)
def test_retried_statuses(status: int, code: str) -> None:
    assert decide(status) == Decision(status="pending", delay_s=1.0, error_code=code)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308, 399])
def test_redirects_are_final(status: int) -> None:
    assert decide(status) == Decision(status="exhausted", error_code="redirect")
    assert decide(status, "redirect") == Decision(status="exhausted", error_code="redirect")


@pytest.mark.parametrize("status", [400, 402, 405, 413, 415, 422, 451, 499])
def test_other_4xx_are_final(status: int) -> None:
    assert decide(status) == Decision(status="exhausted", error_code="http_4xx")


def test_gone_is_final_and_disables_whatever_the_settings_say() -> None:
    expected = Decision(status="exhausted", disable_endpoint=True, error_code="http_4xx")
    assert decide(410) == expected
    assert decide(410, policy=RetryPolicy((1.0,), frozenset({410}))) == expected
    assert decide(410, retry_after="5") == expected
    assert decide(410, "timeout").disable_endpoint is False


def test_settings_choose_the_statuses() -> None:
    policy = RetryPolicy((1.0,), frozenset({302, 404}))
    assert decide(302, policy=policy).status == "pending"
    assert decide(404, policy=policy).status == "pending"
    assert decide(500, policy=policy) == Decision(status="exhausted", error_code="http_5xx")


@pytest.mark.parametrize("status", [-1, 0, 99, 100, 101, 199, 600, 999, 10**30])
def test_what_is_no_final_status_counts_as_5xx(status: int) -> None:
    assert decide(status) == Decision(status="pending", delay_s=1.0, error_code="http_5xx")
    without_500 = RetryPolicy((1.0,), frozenset({503}))
    assert decide(status, policy=without_500).status == "exhausted"


@pytest.mark.parametrize("code", ["dns", "connect", "tls", "timeout", "reset", "internal", "unheard-of"])
def test_errors_of_the_way_are_retried(code: str) -> None:
    assert decide(None, code) == Decision(status="pending", delay_s=1.0, error_code=code)


def test_an_error_goes_before_the_status_it_came_with() -> None:
    # A connection shut down at its deadline can look like an answer of 200.
    assert decide(200, "timeout") == Decision(status="pending", delay_s=1.0, error_code="timeout")


@pytest.mark.parametrize("code", ["blocked", "rate_limited", "redirect"])
def test_errors_that_are_final(code: str) -> None:
    assert decide(None, code) == Decision(status="exhausted", error_code=code)


def test_neither_status_nor_error_is_internal() -> None:
    assert decide() == Decision(status="pending", delay_s=1.0, error_code="internal")


def test_every_status_agrees_with_its_code() -> None:
    for status in range(100, 600):
        code = error_code_for_status(status)
        decision = decide(status)
        assert decision.error_code == code
        assert (decision.status == "succeeded") == (code is None) == (status // 100 == 2)
        retried = {*DEFAULT_RETRY_STATUSES, 401, 403, 404}
        assert (decision.status == "pending") == (status in retried or status < 200)


def test_the_schedule_is_walked_to_its_end() -> None:
    delays = [decide(500, number=number).delay_s for number in range(1, 12)]
    assert delays == list(map(float, DEFAULT_RETRY_SCHEDULE))
    assert decide(500, number=12) == Decision(status="exhausted", error_code="http_5xx")


def test_fewer_or_more_attempts_than_the_schedule_has() -> None:
    assert decide(500, number=3, max_attempts=3).status == "exhausted"
    assert decide(500, number=1, max_attempts=1).status == "exhausted"
    assert decide(500, number=40, max_attempts=100).delay_s == 86400.0
    assert decide(500, number=13, max_attempts=12).status == "exhausted"
    assert decide(500, policy=RetryPolicy((), frozenset({500})), max_attempts=5).status == "exhausted"


@pytest.mark.parametrize(("random", "delay"), [(0.0, 270.0), (0.25, 285.0), (0.5, 300.0), (1.0, 330.0)])
def test_jitter(random: float, delay: float) -> None:
    assert decide(500, number=4, random=random).delay_s == pytest.approx(delay)


@pytest.mark.parametrize(
    ("retry_after", "delay"),
    [
        ("0", 300.0),
        ("10", 300.0),
        ("301", 301.0),
        ("3600", 3600.0),
        ("86401", 86400.0),
        ("9999999999", 86400.0),
        ("99999999999", 300.0),
        ("Mon, 01 Jan 2024 13:00:00 GMT", 3600.0),
        ("Mon, 01 Jan 2024 11:00:00 GMT", 300.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0),
        ("nonsense", 300.0),
        ("nan", 300.0),
        (None, 300.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_clamped(retry_after: str | None, delay: float, status: int) -> None:
    assert decide(status, number=4, retry_after=retry_after).delay_s == delay


def test_retry_after_never_shortens_the_schedule_even_with_jitter() -> None:
    assert decide(503, number=4, retry_after="1", random=0.0).delay_s == 300.0
    assert decide(503, number=4, retry_after="1", random=1.0).delay_s == pytest.approx(330.0)


def test_a_schedule_longer_than_a_day_stands() -> None:
    policy = RetryPolicy((200_000.0,), frozenset({503}))
    assert decide(503, policy=policy, retry_after="100000").delay_s == 200_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("007", 7.0),
        ("120", 120.0),
        (" 120\t", 120.0),
        ("Mon, 01 Jan 2024 12:00:30 GMT", 30.0),
        ("Monday, 01-Jan-24 12:00:30 GMT", 30.0),
        ("Mon Jan  1 12:00:30 2024", 30.0),
        ("Sun, 31 Dec 2023 12:00:30 GMT", 0.0),
    ],
)
def test_parse_retry_after(value: str, seconds: float) -> None:
    assert parse_retry_after(value, NOW) == seconds
    assert parse_retry_after(value, NOW.astimezone(timezone(timedelta(hours=-8)))) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "", " ", "nan", "NaN", "inf", "Infinity", "-1", "+1", "1.5", "1e3", "0x10", "1_000", "12 0", "10s",
        "1, 2",
        "\u0661\u0662", "\u00b2", "\uff11", "1\n", "\x0b1", "\u00a01", "1" * 11, "9" * 5000,
        "2024-01-01T12:00:30Z", "Mon, 01 Jan 2024 12:00:30", "Mon, 01 Jan 2024 12:00:30 +0100",
        "Mon, 01 Jan 2024 12:00:30 EST", "Mon, 32 Jan 2024 12:00:30 GMT", "Mon, 01 Jan 2024 25:00:30 GMT",
        "Mon, 01 Foo 2024 12:00:30 GMT", "01 Jan 2024 12:00:30 GMT", "\ud800",
    ],
    ids=ascii,
)  # fmt: skip
def test_parse_retry_after_refuses(value: str) -> None:
    assert parse_retry_after(value, NOW) is None


@given(st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{2} Jan [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"))
def test_parse_retry_after_never_raises(value: str) -> None:
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or seconds >= 0


@given(
    st.datetimes(datetime(2024, 1, 1, 12), datetime(2300, 1, 1)).map(
        lambda d: d.replace(microsecond=0, tzinfo=UTC)
    )
)
def test_parse_retry_after_reads_what_the_standard_library_writes(moment: datetime) -> None:
    assert parse_retry_after(format_datetime(moment, usegmt=True), NOW) == (moment - NOW).total_seconds()


@given(
    st.none() | st.integers(),
    st.none() | st.sampled_from(["blocked", "timeout", "redirect", "http_5xx", "x"]),
    st.integers(1, 50),
    st.integers(1, 50),
    st.none() | st.text() | st.integers(0).map(str),
    st.floats(0, 1),
)
def test_decisions_are_always_well_formed(
    status: int | None, code: str | None, number: int, most: int, retry_after: str | None, random: float
) -> None:
    decision = decide(status, code, number=number, max_attempts=most, retry_after=retry_after, random=random)
    assert (decision.error_code is None) == (decision.status == "succeeded")
    assert (decision.delay_s is None) == (decision.status != "pending")
    if decision.delay_s is not None:
        assert 0.9 <= decision.delay_s <= 86400 * 1.1
        assert number < most


@pytest.mark.parametrize("status", [401, 403, 404])
def test_401_403_and_404_get_five_attempts(status: int) -> None:
    """The quick retries and one at five minutes: the client may not have stored the job's id yet."""
    delays = [decide(status, number=number).delay_s for number in range(1, 6)]
    assert delays == [1.0, 2.0, 4.0, 300.0, None]
    assert decide(status, number=5) == Decision(status="exhausted", error_code="http_4xx")


def test_fewer_attempts_bind_and_a_setting_asks_for_more() -> None:
    assert decide(404, number=2, max_attempts=2).status == "exhausted"
    policy = RetryPolicy(DEFAULT_RETRY_SCHEDULE, frozenset({404}))
    assert decide(404, number=5, policy=policy).delay_s == 1800.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 410, 425, 429, 499])
def test_every_4xx_is_final_where_the_format_says_so(status: int) -> None:
    assert decide(status, retry_after="5", retry_4xx=False) == Decision(
        status="exhausted", error_code="http_4xx", disable_endpoint=status == 410
    )
    assert decide(503, retry_4xx=False).status == "pending"
