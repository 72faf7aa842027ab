"""The service's own tables."""

from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()


class Run(db.Model):
    runid = db.Column(db.String(64), primary_key=True)
    config = db.Column(db.String(64), nullable=False)
    readonly = db.Column(db.Boolean, nullable=False, default=False)
