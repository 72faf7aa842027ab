"""The directive ``rq-webhooks-settings``: the settings of one group, from the metadata the package reads.

``.. rq-webhooks-settings:: retries`` describes those that belong to retries. The build fails where the page
leaves a group out.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

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

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (group,) = self.arguments
        groups = {setting.group for setting in SETTINGS}
        left = self.state.document.settings.env.temp_data.setdefault("settings_left", groups)
        if group not in left:
            raise self.error(f"{group!r} is not one of the groups left: {', '.join(sorted(left))}")
        left.remove(group)
        lines = [line for one in SETTINGS if one.group == group for line in describe(one)]
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source="flask_rq_webhooks/config.py"), 0, container)
        return list(container.children)


def refuse_missing(app: Sphinx, doctree: nodes.document) -> None:
    """Fail where a page has described some groups and not all."""
    if left := app.env.temp_data.get("settings_left"):
        raise ExtensionError(f"The configuration page lacks the settings of: {', '.join(sorted(left))}.")


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
    app.connect("doctree-read", refuse_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
