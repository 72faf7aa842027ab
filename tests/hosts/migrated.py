"""A host whose tables are kept by Flask-Migrate, configured by the environment.

``python -m tests.hosts.migrated "db init" "db upgrade"`` runs several ``flask`` commands, each on an app of
its own, in one process; ``without-webhooks db upgrade`` on the app as it was before us.
"""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial

from flask import Flask
from flask.cli import FlaskGroup
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

from flask_rq_webhooks import RQWebhooks


def create_app(*, with_webhooks: bool = True) -> Flask:
    """Build the app, with the webhooks' tables behind a bind key if there is one."""
    db = SQLAlchemy()

    class Run(db.Model):  # type: ignore[name-defined,misc]
        """A model of the host's own."""

        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String(40))

    app = Flask(__name__)
    app.config.update(
        SECRET_KEY="tests",
        SQLALCHEMY_DATABASE_URI=os.environ["HOST_DATABASE_URL"],
        RQ_WEBHOOKS_REDIS_URL="redis://127.0.0.1:1/0",
    )
    if bind_url := os.environ.get("WEBHOOKS_BIND_URL"):
        app.config.update(SQLALCHEMY_BINDS={"hooks": bind_url}, RQ_WEBHOOKS_BIND_KEY="hooks")
    db.init_app(app)
    if with_webhooks:
        RQWebhooks(db=db).init_app(app)
    Migrate(app, db)
    return app


def main(commands: list[str]) -> None:
    """Run *commands* until one fails."""
    for command in commands:
        arguments = shlex.split(command)
        without = arguments[0] == "without-webhooks"
        flask = FlaskGroup(create_app=partial(create_app, with_webhooks=not without))
        print(f"$ flask {command}", flush=True)
        flask.main(args=arguments[1:] if without else arguments, prog_name="flask", standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1:])
