"""The same server tests on every supported stack: ``nox``, or one leg of it with ``nox -s "stack(rq-2.6)"``.

Each leg makes its own virtual environment; ``nox -R`` uses it again. ``make oldest`` runs fewer tests on the
oldest stack and is part of every change.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["stack"]

#: What the tests need beside the stack itself; ``requirements/oldest.txt`` has it for the oldest leg.
NEWEST = ["--editable", ".[test]"]
OLDEST = ["-r", "requirements/oldest.txt", "--editable", "."]

LEGS = {
    # RQ 1.16.2, redis 5, Flask 3.0.0, SQLAlchemy 2.0.30, marshmallow 3: a host app that is years old.
    "oldest": OLDEST,
    "rq-2.6": [*NEWEST, "rq==2.6.*"],
    "rq-2.12": [*NEWEST, "rq==2.12.*"],
    "newest": NEWEST,
}

TESTS = ["tests/acceptance", "tests/integration", "tests/unit"]


@nox.session
@nox.parametrize("leg", [nox.param(leg, id=leg) for leg in LEGS])
def stack(session: nox.Session, leg: str) -> None:
    """Run the tests that start servers on one stack; further arguments go to pytest."""
    session.install(*LEGS[leg])
    session.run(
        "python", "-c",
        "import importlib.metadata as m; "
        "print(*(f'{n} {m.version(n)}' for n in 'rq redis flask sqlalchemy marshmallow'.split()), sep=', ')",
    )  # fmt: skip
    # Old releases warn of what new ones removed; `make test` runs the newest with warnings as errors.
    session.run(
        "python", "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *(session.posargs or TESTS)
    )
