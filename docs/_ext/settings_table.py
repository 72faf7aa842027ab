"""The directive ``rq-webhooks-settings``: settings with their defaults, from the table the package reads.

``.. rq-webhooks-settings:: ENABLED REDIS_URL`` describes these two. Without names it describes every setting
that the page has not described yet, so that none is missing.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from flask_rq_webhooks.config import DEFAULT_RETRY_SCHEDULE, DEFAULT_RETRY_STATUSES, PREFIX, SETTINGS, Setting
from flask_rq_webhooks.version import __version__

#: Defaults that read better than their ``repr``.
SPOKEN: dict[Any, str] = {
    DEFAULT_RETRY_SCHEDULE: "``" + ", ".join(f"{delay:g}" for delay in DEFAULT_RETRY_SCHEDULE) + "``",
    DEFAULT_RETRY_STATUSES: "``408, 409, 425, 429`` and ``500`` to ``599``",
    f"flask-rq-webhooks/{__version__}": "``flask-rq-webhooks/<version>``",
    (): "empty",
}


class SettingsTable(Directive):
    """One target and one definition per setting: ``:ref:`setting-timeout```."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        settings = {setting.name: setting for setting in SETTINGS}
        page = self.state.document.settings.env.temp_data
        described: set[str] = page.setdefault("described_settings", set())
        names = self.arguments[0].split() if self.arguments else [n for n in settings if n not in described]
        if unknown := set(names) - set(settings):
            raise self.error(f"no such setting: {', '.join(sorted(unknown))}")
        if repeated := described & set(names):
            raise self.error(f"described twice: {', '.join(sorted(repeated))}")
        described.update(names)
        lines = [line for name in names for line in describe(settings[name])]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source="flask_rq_webhooks/config.py"), 0, container)
        return list(container.children)


def describe(setting: Setting) -> list[str]:
    """Return one setting as reStructuredText."""
    default = SPOKEN.get(setting.default, f"``{setting.default!r}``")
    lines = [
        f".. _setting-{setting.name.lower().replace('_', '-')}:",
        "",
        f"``{PREFIX}{setting.name}``",
        "    " + setting.about.replace("_", r"\_"),  # plain text, no reStructuredText
        "",
        f"    Default: {default}.",
    ]
    if setting.env:
        names = ", then ".join(f"``{name}``" for name in setting.env)
        if setting.config_key is not None:
            lines[-1] += f' If it is not set: ``app.config["{setting.config_key}"]``.'
        lines[-1] += f" Environment: {names}" + (" (total attempts)." if setting.parse_env else ".")
    return [*lines, ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("rq-webhooks-settings", SettingsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
