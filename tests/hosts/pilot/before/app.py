"""The service: a module-global app, as such apps are."""

import os

from flask import Flask
from flask_migrate import Migrate
from models import db
from routes.build import build_routes
from routes.project import project_routes
from routes.run import run_routes
from rq_hooks import install_hooks


class WatershedApp(Flask):
    def register_extension(self, extension):
        extension.init_app(self)


app = WatershedApp(__name__)
app.config.update(
    SECRET_KEY=os.environ["SECRET_KEY"],
    SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"],
)
app.config.from_prefixed_env()

install_hooks()

app.register_extension(db)
Migrate(app, db)

app.register_blueprint(build_routes)
app.register_blueprint(run_routes)
app.register_blueprint(project_routes)


@app.get("/health")
def health():
    return "OK"
