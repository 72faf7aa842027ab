"""Serve one of the Flask apps on loopback, for the demo and the tests.

``python -m example_app.serve example_app.app:app`` prints the URL, with a port that the kernel chose.
A real deployment runs under a production server instead, such as gunicorn.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from flask import Flask
from werkzeug.serving import make_server


def load_app(path: str) -> Flask:
    """Return the app at ``module:name``, or what the function there returns.

    :raises TypeError: when it is no Flask app.
    """
    module, _, name = path.partition(":")
    found = getattr(import_module(module), name or "app")
    app = found if isinstance(found, Flask) else found()
    if not isinstance(app, Flask):
        raise TypeError(f"{path} is {app!r}, not a Flask app")
    return app


def create_tables(app: Flask) -> None:
    """Create the tables of the app and of flask_rq_webhooks; real apps use Flask-Migrate."""
    if "sqlalchemy" in app.extensions:
        with app.app_context():
            app.extensions["sqlalchemy"].create_all()
    else:
        app.extensions["rq_webhooks"].database.create_tables()


def main() -> None:
    """Create the tables, then serve until the process is ended."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("app", help="module:name of a Flask app or of a function that returns one")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    arguments = parser.parse_args()
    app = load_app(arguments.app)
    create_tables(app)
    server = make_server("127.0.0.1", arguments.port, app, threaded=True)
    print(f"serving on http://127.0.0.1:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
