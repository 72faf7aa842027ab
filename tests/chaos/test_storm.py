"""Storms over four profiles, each followed by the audit. A short one is part of ``make test``.

``make chaos`` runs a part of it, ``make chaos LONG=1`` all of it (``RQ_WEBHOOKS_CHAOS_LONG``). With
``RQ_WEBHOOKS_CHAOS_FILE`` set, the counts are added there, one JSON object a line, for the docs. On a
fault, everything that speaks of the job is printed, and kept in ``RQ_WEBHOOKS_CHAOS_FOLDER`` (``.chaos``).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.auditor import Audit, Evidence, audit
from tests.chaos.falsify import FALSIFICATIONS, Case
from tests.chaos.field import Field, open_field
from tests.chaos.rq_record import read_record
from tests.chaos.storm import keep_evidence, storm
from tests.servers import ROOT

LONG = bool(os.environ.get("RQ_WEBHOOKS_CHAOS_LONG"))
FOLDER = Path(os.environ.get("RQ_WEBHOOKS_CHAOS_FOLDER", ROOT / ".chaos"))
#: Jobs of one storm, and the seeds of each profile: 4 × 450, or 4 × 2 × 1,900.
COUNT, SEEDS = (1900, (1, 2)) if LONG else (450, (1,))


def note(name: str, found: Audit, kills: Any, **more: Any) -> None:
    """Add what was measured to the file for the docs, where one is wanted."""
    path = os.environ.get("RQ_WEBHOOKS_CHAOS_FILE")
    if not path:
        return
    line = {
        "name": name,
        "accepted": found.accepted,
        "runs": found.runs,
        "reported": dict(found.reported),
        "by_source": dict(found.by_source),
        "corrections": found.corrections,
        "faults": dict(found.counts),
        "requests": found.requests,
        "repeats": found.repeats,
        "kills": dict(kills),
        **more,
    }
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def weather(target: Field, seed: int, count: int, profile: str, *, timeout: float) -> None:
    """Play one storm, note what came of it, and fail with the evidence where a promise was broken."""
    began = time.monotonic()
    print(f"\nstorm: {profile}, seed {seed}, {count} jobs", flush=True)
    found, evidence = storm(target, seed, count, timeout=timeout)
    seconds = round(time.monotonic() - began)
    print(f"storm: {profile}, seed {seed}: {found} in {seconds} s", flush=True)
    note(
        "storm",
        found,
        target.kills,
        profile=profile,
        seed=seed,
        kinds=dict(found.kinds),
        unanswered=sum(not answer.promised for answer in evidence.answers),
        seconds=seconds,
        falsified=falsify(found, evidence),
    )
    if found.faults:
        folder = FOLDER / f"{profile.replace(', ', '-').replace(' ', '_')}-{seed}"
        about = keep_evidence(target, found, evidence, folder)
        pytest.fail(f"{found}\nevidence in {folder}\n\n{about}", pytrace=False)


def falsify(found: Audit, evidence: Evidence) -> int:
    """Put every falsification into a finished run; return how many were put in, all of them counted."""
    case = Case(evidence, read_record(evidence.commands))
    changed = {name: change(case) for name, (_, change) in FALSIFICATIONS.items()}
    missed = [
        name
        for name, false in changed.items()
        if false is not None
        and audit(false, case.record if false.commands is evidence.commands else None).counts[
            FALSIFICATIONS[name][0]
        ]
        <= found.counts[FALSIFICATIONS[name][0]]
    ]
    assert missed == []
    return sum(false is not None for false in changed.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_storm(tmp_path: Path) -> None:
    with open_field(tmp_path) as field:
        weather(field, 7, 60, "SQLite", timeout=240)


@pytest.mark.chaos
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clean", [True, False], ids=["clean", "not-clean"])
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_storm(tmp_path: Path, request: pytest.FixtureRequest, database: str, clean: bool, seed: int) -> None:
    name = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[database]
    server = request.getfixturevalue("postgres") if database == "postgresql" else None
    profile = f"{name}, CLEAN_ABANDONED" if clean else name
    # Another seed for every storm; the same one in every run of the suite.
    number = 100 * seed + 10 * (database == "sqlite") + clean
    with open_field(tmp_path, postgres=server, clean_abandoned=clean) as field:
        weather(field, number, COUNT, profile, timeout=3000)
