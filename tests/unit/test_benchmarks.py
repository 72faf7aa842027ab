"""The arithmetic behind the figures of the documentation, and that these come from the file of results."""

from __future__ import annotations

import json
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from benchmarks import write_tables
from benchmarks.harness import (
    Benchmark,
    Contender,
    Line,
    Report,
    Run,
    Size,
    alternately,
    arrival_rate,
    blocks,
    busy_share,
    figure,
    in_words,
    median_rate,
    percentile,
    print_table,
    ratios,
    read_json,
    write_json,
)
from benchmarks.promises import PROMISES
from benchmarks.receiver import checked
from benchmarks.registry import BENCHMARKS
from benchmarks.stages import shares_by_package
from flask_rq_webhooks.protocol.signatures import signature_headers


def test_rates_are_compared_round_by_round() -> None:
    # A slow second round for both: the ratio of the medians would be 600 / 300.
    ours, limit = [Run(900), Run(300), Run(600)], [Run(1000), Run(300), Run(200)]

    assert ratios(ours, limit) == [0.9, 1.0, 3.0]
    assert median_rate(ours) == 600


def test_contenders_take_turns_after_a_short_turn_that_does_not_count() -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Contender:
        def run(count: int) -> Run:
            calls.append((name, count))
            return Run(float(len(calls)))

        return Contender(400, run)

    runs = alternately({"a": contender("a"), "b": contender("b")}, 3)

    assert calls == [
        ("a", 20), ("b", 20), ("a", 400), ("b", 400), ("b", 400), ("a", 400), ("a", 400), ("b", 400),
    ]  # fmt: skip
    assert [run.rate for run in runs["a"]] == [3.0, 6.0, 7.0]


def test_a_single_round_has_no_turn_to_warm_up() -> None:
    calls: list[int] = []

    def run(count: int) -> Run:
        calls.append(count)
        return Run(1.0)

    alternately({"a": Contender(400, run)}, 1)

    assert calls == [400]


@pytest.mark.parametrize(
    ("began", "rate", "first"),
    [
        pytest.param(None, (94 - 15) / (94 - 15), 15, id="without start and end"),
        pytest.param(-5.0, 95 / 99, 0, id="from the moment work began"),
    ],
)
def test_rate_of_arrivals(began: float | None, rate: float, first: int) -> None:
    arrivals = [float(second) for second in range(100)]

    assert arrival_rate(reversed(arrivals), 100, began) == (pytest.approx(rate), first)


def test_a_series_is_cut_into_parts() -> None:
    assert blocks([1, 1, 5, 2, 2, 9, 3, 3, 3], 3) == [1, 2, 3]
    assert blocks([4.0, 6.0], 5) == [4.0, 6.0]


def test_percentile() -> None:
    assert percentile([5, 1, 4, 2, 3], 0.5) == 3
    assert percentile(range(100), 0.99) == 99
    assert percentile([7], 0.99) == 7


def test_guests_are_not_counted_twice_in_what_was_busy() -> None:
    Times = namedtuple("Times", "user idle iowait guest")

    assert busy_share(Times(10, 50, 5, 3), Times(40, 110, 15, 13)) == pytest.approx(0.3)
    assert busy_share(Times(1, 1, 1, 1), Times(1, 1, 1, 1)) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.583, "share", "0.58"),
        (4.256, "x", "4.26×"),
        (41.26, "x", "41.3×"),
        (1234.5, "x", "1,234×"),
        (1234.5, "/s", "1,234/s"),
        (0.4321, "ms", "0.43 ms"),
        (14.26, "µs", "14 µs"),
        (-1.26, "µs", "-1.3 µs"),
        (94.9, "MB", "95 MB"),
    ],
)
def test_figures_have_the_digits_they_are_worth(value: float, unit: str, text: str) -> None:
    assert figure(value, unit) == text


def test_a_line_says_its_median_its_spread_and_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("Deliveries")
    line = report.add("of the limit", [0.7, 0.5, 0.64], "share", promise="limit", at_least=0.6)
    slower = report.add("latency", [30.0], "ms", promise="latency", at_most=25)
    report.add("rate", 812.0, "/s")

    assert (line.value, line.low, line.high, line.holds) == (0.64, 0.5, 0.7, True)
    assert in_words(line).split()[-8:] == ["0.64", "[0.50", "…", "0.70]", "(target", "≥", "0.6)", "met"]
    assert in_words(slower).endswith("30.0 ms  (target ≤ 25 ms)  NOT MET")
    print_table({"deliveries": report})
    assert "1 of 2 targets met." in capsys.readouterr().out
    with pytest.raises(KeyError):
        report.add("nobody promised this", 1.0, "x", promise="unheard of")


def test_a_failing_benchmark_is_reported_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_size: Size) -> Report:
        """Break a promise."""
        raise AssertionError("999 of 1,000 delivered")

    report = Benchmark(run, full={"count": 2}, quick={"count": 1}).measure(quick=True)

    assert report.error == "AssertionError: 999 of 1,000 delivered"
    assert (report.title, report.quick, report.lines) == ("Break a promise.", True, [])
    assert "999 of 1,000 delivered" in capsys.readouterr().err


def test_sizes_reach_the_benchmark() -> None:
    seen: list[dict[str, int]] = []

    def run(size: Size) -> Report:
        seen.append(dict(size))
        return Report("Nothing")

    benchmark = Benchmark(run, full={"rounds": 5, "count": 100}, quick={"rounds": 1, "count": 10})
    benchmark.measure()
    benchmark.measure(rounds=2)
    benchmark.measure(quick=True)

    assert seen == [{"rounds": 5, "count": 100}, {"rounds": 2, "count": 100}, {"rounds": 1, "count": 10}]


def test_results_survive_their_file_and_some_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first, second = Report("First", data={"a": 1}), Report("Second", error="broken")
    first.add("rate", [1.0, 3.0, 2.0], "/s")
    write_json(path, {"first": first, "second": second})
    machine, reports = read_json(path)

    assert reports == {"first": first, "second": second}
    assert {"python", "processors", "packages"} <= machine.keys()

    write_json(path, {"second": Report("Again")}, into=json.loads(path.read_text()))
    assert read_json(path)[1] == {"first": first, "second": Report("Again")}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_has_a_quick_size(name: str) -> None:
    benchmark = BENCHMARKS[name]

    assert benchmark.quick.keys() == benchmark.full.keys()
    assert all(0 < benchmark.quick[key] <= benchmark.full[key] for key in benchmark.full)
    assert benchmark.quick != benchmark.full


def test_every_promise_has_a_benchmark() -> None:
    assert {key for benchmark in BENCHMARKS.values() for key in benchmark.promises} == set(PROMISES)


def request(
    body: bytes, *, secret: str | None = "the secret of one client", number: int = 0
) -> tuple[bytes, bytes]:
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(int(time.time())),
        "X-Webhook-Delivery": f"dlv_{number}",
    }
    if secret is not None:
        headers |= signature_headers(
            [secret], event_id="evt_1", timestamp=int(time.time()), body=body, header_prefix="X-Webhook",
            iso_timestamp=False,
        )  # fmt: skip
    head = "POST /0/hook HTTP/1.1" + "".join(f"\r\n{name}: {value}" for name, value in headers.items())
    return head.encode(), body


def test_the_receiver_checks_both_signatures() -> None:
    assert checked([request(b"{}", number=1), request(b"[]", number=2)]) == {
        "requests": 2, "distinct": 2, "signed": 2, "wrong": [],
    }  # fmt: skip


def test_the_receiver_counts_unsigned_forged_and_repeated_requests() -> None:
    seen = checked(
        [
            request(b"{}", secret=None, number=1),
            request(b"{}", secret="another", number=2),
            request(b"{}", secret=None, number=1),
        ]
    )

    assert (seen["requests"], seen["distinct"], seen["signed"]) == (3, 2, 0)
    assert len(seen["wrong"]) == 1


def test_a_profile_by_package_gives_built_in_time_to_callers() -> None:
    ours, theirs = "/clone/flask_rq_webhooks/observe/ingest.py", "/venv/lib/site-packages/redis/client.py"
    stats = {
        (ours, 1, "run"): (1, 1, 2.0, 9.0, {}),
        (theirs, 2, "pack"): (1, 1, 1.0, 4.0, {}),
        ("/usr/lib/python3/json/decoder.py", 3, "decode"): (1, 1, 1.0, 1.0, {}),
        ("~", 0, "<len>"): (
            4,
            4,
            4.0,
            4.0,
            {(ours, 1, "run"): (1, 1, 1.0, 1.0), (theirs, 2, "pack"): (3, 3, 3.0, 3.0)},
        ),
    }

    assert shares_by_package(stats) == {"redis": 0.5, "flask_rq_webhooks": 0.375, "json": 0.125}


def results() -> tuple[dict[str, Any], dict[str, Report]]:
    return read_json(write_tables.RESULTS)


def test_the_documentation_shows_the_committed_results() -> None:
    shown = {path.name: path.read_text() for path in write_tables.TARGET.iterdir()}

    assert shown == write_tables.pages(write_tables.RESULTS)


def test_the_committed_results_are_complete() -> None:
    _machine, reports = results()

    assert reports.keys() == BENCHMARKS.keys()
    assert not {name: report.error for name, report in reports.items() if report.error}
    assert not [name for name, report in reports.items() if report.quick]
    promised = {line.promise for report in reports.values() for line in report.lines} - {""}
    assert promised == set(PROMISES)


def test_tables_say_what_was_not_measured_or_not_met() -> None:
    report = Report("Latency", skipped=["psycopg: not installed"])
    report.lines.append(Line(what="p50", value=30, unit="ms", low=30, high=30, promise="latency", at_most=25))
    broken = Report("Memory", error="AssertionError: lost one")
    reports = {"latency": report, "memory": broken}

    assert "      - not measured" in write_tables.promises(reports)
    assert "    * - p50\n      - 30.0 ms\n      -\n      - ≤ 25 ms\n      - **no**" in write_tables.promises(
        reports
    )
    verdict = write_tables.verdict(reports)
    assert verdict.startswith("0 of 1 targets are met. Not met:")
    assert "Not finished: memory." in verdict
    assert "Left out: psycopg: not installed." in verdict


def test_a_million_an_hour_is_worked_out_from_the_figures() -> None:
    runs = [{"rate": 500.0, "cpu_ms": 1.0, "busy": 0.5}]
    reports = {"deliveries": Report("Deliveries", data={"PostgreSQL": runs})}
    text = write_tables.million(reports, 4)

    assert "1 by rate, busy to 56%; 0.28 processors." in text  # 277.8 / 500; 277.8 × 1 ms
    assert "4.00 ms of CPU a delivery" in text  # half of 4 processors for a 500th of a second
    assert "1.1 processors" in text
