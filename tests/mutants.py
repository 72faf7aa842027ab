"""Negate each rule of the rule book in turn, and say which test notices.

Usage: ``python -m tests.mutants [NAME …]``. Works on a copy of the package. Prints one line a rule; exits 1
if a mutant survives or its text is no longer there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/unit/test_outcomes.py", "tests/unit/test_observe_machine.py")

OUTCOMES, CONCLUSIONS, INGEST, RECONCILE = (
    f"flask_rq_webhooks/observe/{name}.py" for name in ("outcomes", "conclusions", "ingest", "reconcile")
)
#: What is asked beside them where a rule is no pure function.
MORE_TESTS = {
    INGEST: ("tests/integration/test_four_endings.py", "tests/integration/test_ingest.py"),
    RECONCILE: ("tests/integration/test_reconcile.py", "tests/integration/test_four_endings.py"),
}

#: Rule, file, text, and what it becomes.
MUTANTS: tuple[tuple[str, str, str, str], ...] = (
    ("a report is no commit", OUTCOMES, "        if report is None or job.status not in _BETWEEN_RUNS:",
     "        if report is not None:\n            return by_report(report)\n"
     "        if report is None or job.status not in _BETWEEN_RUNS:"),
    ("what RQ committed wins over the report", OUTCOMES,
     "    return Outcome(type=committed, run=run, ended_at=_ended_at(job, own), exc=exc)",
     "    return Outcome(type=committed if report is None else _TYPE_OF_KIND[report.kind], run=run,\n"
     "        ended_at=_ended_at(job, own), exc=exc)"),
    ("a job canceled while it runs may still finish", OUTCOMES,
     "if committed == JOB_CANCELED and report is not None and report.kind != \"stopped\" and patient:",
     "if False:"),
    ("RQ's own reason is read where the callback has none", OUTCOMES,
     "        if job.results is None:\n            return Undecided.NEEDS_RESULTS\n        exc =",
     "        exc ="),
    ("a hash that looks older is waited for", OUTCOMES,
     "if patient and job.run is not None and _began_before(job.run, run):", "if False:"),
    ("a failure with retries left ends nothing", OUTCOMES,
     "return report.kind == \"failure\" and bool(report.retries_left)", "return False"),
    ("a retry takes one from retries_left", OUTCOMES, "later.retries_left < report.retries_left",
     "later.retries_left > report.retries_left"),
    ("the next report shows a retry", OUTCOMES,
     "if _expects_retry(report) or _was_retried(report, following):", "if _expects_retry(report):"),
    ("the result follows the report", OUTCOMES,
     "if result is own or result.at < reported_at(report) - _MILLISECOND:", "if result is own:"),
    ("the current run's result is no earlier run's", OUTCOMES,
     "own = own_result(job) if job.run != report.run else None", "own = None"),
    ("the result precedes the next report", OUTCOMES,
     "if following is not None and result.at > reported_at(following):", "if False:"),
    ("an execution begins before its run's started_at", OUTCOMES,
     "return result if result.started_at <= parse_time(report.started_at) else None", "return result"),
    ("a stopped run leaves a failure", OUTCOMES,
     "if report.kind == \"stopped\" and result.type in (\"success\", \"retried\"):", "if False:"),
    ("only a stop keeps RQ from retrying", OUTCOMES,
     "if _expects_retry(report) and _type_of(result) != JOB_STOPPED:", "if False:"),
    ("a result that was reported is not reported again", OUTCOMES,
     "        return Undecided.REPORTED", "        pass"),
    ("a stop is no failure", OUTCOMES, ".startswith(\"Job stopped by user\")", ".startswith(\"never\")"),
    ("an own result says what the hash says", OUTCOMES,
     "if committed is None or _type_of(last) != committed:", "if committed is None:"),
    ("an own result ended when the hash says", OUTCOMES,
     "return last if abs(last.ended_at - job.ended_at) <= _MILLISECOND else None", "return last"),
    ("earlier runs: not the current run's result", OUTCOMES,
     "        if result is not own\n        and result.type", "        if result.type"),
    ("earlier runs: not what was reported", OUTCOMES, "    left = _unclaimed(results, others)",
     "    left = list(results)"),
    ("earlier runs: not those before the run that is noted", OUTCOMES,
     "found = [result for result in left if result.at >= since - CLOCK_SKEW]", "found = list(left)"),
    ("earlier runs: clocks may differ by minutes", OUTCOMES,
     "found = [result for result in left[-1:] if result.at >= since - LARGE_CLOCK_SKEW]", "found = []"),
    ("earlier runs: each has its own identity", OUTCOMES, "        open_run = None\n    return outcomes",
     "    return outcomes"),
    ("RQ 1.16: an ending takes a result of its type", OUTCOMES,
     "    for ending in reversed(unmatched):", "    for ending in ():"),
    ("a run has one ending", OUTCOMES,
     "if ending.type == outcome.type or ending.corrected or now - ending.stored_at > CORRECTIONS_FOR:",
     "if False:"),
    ("only RQ corrects RQ", OUTCOMES, "if not outcome.committed and ending.type != JOB_LOST:", "if False:"),
    ("a report corrects a loss", OUTCOMES,
     "        return replace(outcome, run=ending.run, supersedes=ending.event_id)",
     "        if ending.type == JOB_LOST:\n            return None\n"
     "        return replace(outcome, run=ending.run, supersedes=ending.event_id)"),
    ("RQ changes its mind", OUTCOMES,
     "        return replace(outcome, run=ending.run, supersedes=ending.event_id)", "        return None"),
    ("a loss before the run was known is corrected, too", OUTCOMES,
     "if ending.run != outcome.run and not is_loss_of(ending, outcome):", "if ending.run != outcome.run:"),
    ("a job is missed twice before it is lost", CONCLUSIONS,
     "if watch.missing_passes + 1 < LOST_AFTER_PASSES:", "if False:"),
    ("absence proves nothing while a report may wait", CONCLUSIONS,
     "WatchAction.LOST if outbox.has_all_of_absent else WatchAction.WAIT", "WatchAction.LOST"),
    ("a parked report waits for later ones", CONCLUSIONS,
     "        if not outbox.has_all_of_absent:", "        if False:"),
    ("an id that was only reserved is not lost", CONCLUSIONS,
     "if watch.status == \"reserved\" and watch.run is None:", "if False:"),
    ("a job handed to RQ is lost if it never comes", CONCLUSIONS,
     "if watch.status == \"reserved\" and now - watch.created_at <= RESERVED_GRACE:",
     "if watch.status == \"reserved\":"),
    ("runs before registration do not count", CONCLUSIONS,
     "return (job.enqueued_at or job.created_at) >= watch.counts_from - CLOCK_SKEW", "return True"),
    ("a job that carries the endpoint counts", CONCLUSIONS,
     "if watch.endpoint_id is not None and watch.endpoint_id in job.tokens:", "if False:"),
    ("a run other than the one noted counts", CONCLUSIONS,
     "if watch.run is not None and watch.status != \"reserved\":", "if False:"),
    ("callbacks go first", CONCLUSIONS,
     "return timedelta(0) <= now - job.ended_at < CALLBACK_GRACE", "return False"),
    ("earlier runs wait until the callbacks' reports are read", CONCLUSIONS,
     "outcome.result is not None and outcome.result.at >= outbox.until for outcome in earlier",
     "False for outcome in earlier"),
    ("a retry is reported to those who asked", CONCLUSIONS,
     "        return [Outcome(type=JOB_RETRYING, run=noted)]", "        return []"),
    ("a new run opens a settled watch", RECONCILE, "            if run and run != watch.run.encode():",
     "            if False:"),
    ("a change of mind is looked for", RECONCILE,
     "                if committed is not None and committed != watch.outcome:", "                if False:"),
    ("ingest: a loss is corrected by the report", INGEST, "        and stored_type == JOB_LOST",
     "        and stored_type == 'never'"),
    ("ingest: a retry's report may be further behind", INGEST,
     "if job is None and is_newest and entry.retries_left and self._caught_up_at < waiting.since:",
     "if False:"),
    ("ingest: reports of one job are seen together", INGEST, "            if len(some) > 1:",
     "            if False:"),
    ("reconcile: the outbox is asked before anything else", RECONCILE,
     "            until=until or absent_since, absent_since=",
     "            until=server_time(self._redis), absent_since="),
    ("a report that may be unread is not missing", CONCLUSIONS, "and at < outbox.complete_until", "and at"),
)  # fmt: skip


def caught_by(folder: Path, tests: Sequence[str]) -> str | None:
    """Return the first of the tests that fails on the package in *folder*."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("RQ_WEBHOOKS_GAMES", "500")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return None
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", answer.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(f"the tests could not run:\n{answer.stdout}{answer.stderr}")
    return failed[1].removeprefix("tests/")


def main() -> int:
    wanted = sys.argv[1:]
    survivors = 0
    for rule, path, text, becomes in MUTANTS:
        if wanted and not any(name in rule for name in wanted):
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for part in ("flask_rq_webhooks", "tests", "benchmarks", "example_app"):
                shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            for part in ("setup.cfg", "pyproject.toml"):
                shutil.copy(ROOT / part, folder / part)
            source = (folder / path).read_text()
            if source.count(text) != 1:
                print(f"{rule}: the text is there {source.count(text)} times", flush=True)
                survivors += 1
                continue
            (folder / path).write_text(source.replace(text, becomes))
            test = caught_by(folder, (*TESTS, *MORE_TESTS.get(path, ())))
        survivors += test is None
        print(f"{rule}: {test or 'SURVIVES'}", flush=True)
    print(f"{survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
