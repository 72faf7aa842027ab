"""Storms over four profiles, each followed by the audit.

``make chaos`` runs one a profile, ``make chaos LONG=1`` longer ones (``RQ_WEBHOOKS_CHAOS_LONG``). With
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
#: Jobs of one storm, and storms of each profile.
COUNT, ROUNDS = (1900, 2) if LONG else (300, 1)


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


#: Name → database, CLEAN_ABANDONED.
PROFILES = {
    "SQLite": ("sqlite", False),
    "SQLite, CLEAN_ABANDONED": ("sqlite", True),
    "PostgreSQL": ("postgresql", False),
    "PostgreSQL, CLEAN_ABANDONED": ("postgresql", True),
}
#: Each storm has a seed of its own, the same in every run of the suite.
STORMS = [
    pytest.param(profile, 10 * number + index, id=f"{profile}, seed {10 * number + index}")
    for number in range(1, ROUNDS + 1)
    for index, profile in enumerate(PROFILES)
]


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("profile", "seed"), STORMS)
def test_storm(tmp_path: Path, request: pytest.FixtureRequest, profile: str, seed: int) -> None:
    database, clean = PROFILES[profile]
    server = request.getfixturevalue("postgres") if database == "postgresql" else None
    with open_field(tmp_path, postgres=server, clean_abandoned=clean) as field:
        weather(field, seed, COUNT, profile, timeout=3000)
