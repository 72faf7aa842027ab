"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from flask_rq_webhooks.version import __version__  # noqa: E402

project = "flask_rq_webhooks"
author = "flask_rq_webhooks contributors"
copyright = f"2025, {author}"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "settings_table", "payload_examples", "cli_help"]
exclude_patterns = ["_build", "receivers/node_modules"]
nitpicky = True
# Types of other projects: their inventories are not fetched, so that the docs build without a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(?:flask|flask_sqlalchemy|rq|redis|requests|sqlalchemy|werkzeug|blinker)\..*"),
    (r"py:.*", r"(?:Flask|SQLAlchemy|Redis|Queue|Job|View|Function|Any|Callable|Mapping|Sequence|State)"),
    (r"py:exc", r"(?:ValueError|TypeError)"),
    (r"py:.*", r"(?:collections|typing)\..*"),
]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

# Python where it is Python, plain text where it is not, and no warning about that.
highlight_language = "default"
html_theme = "furo"
html_title = f"flask_rq_webhooks {release}"
html_static_path = ["_static"]
html_show_sphinx = False
