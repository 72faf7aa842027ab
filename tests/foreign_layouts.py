"""Layouts as other apps have them, for pages that appear inside them. All inline: nothing is loaded."""
# ruff: noqa: E501  (HTML)

from __future__ import annotations

from datetime import datetime

#: A navigation bar whose logout form has the token of Flask-WTF, a block ``page`` around everything, and names
#: of the app's own such as ``now`` and ``q``.
ADMIN = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{% block title %}Admin{% endblock %}</title>
<style>
* { box-sizing: border-box; } body { margin: 0; font: 14px/1.4 sans-serif; color: #222; background: #fff; }
header { background: #21252b; color: #fff; padding: 8px 16px; display: flex; gap: 12px; flex-wrap: wrap; }
button { background: #e8e8e8; color: #111; } a { color: #0645ad; } h1 { text-transform: uppercase; }
</style>{% block head %}{% endblock %}</head><body>
{% block page %}<header><span>Orders of {{ now().year }}</span>
<form id="logout" method="post" action="/logout"><input type="hidden" name="csrf_token" value="{{ csrf_token() }}">
<button>Log out</button></form><span id="own">{{ q }}|{{ filter }}|{{ text }}|{{ section }}</span></header>
<div id="host-main">{% block content %}{% endblock %}</div>{% endblock %}
<footer>{% block left %}left{% endblock %} {% block page_title %}own title{% endblock %}</footer></body></html>"""

#: A dark theme with a narrow column and no block for what belongs into the head.
DARK = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{% block title %}Portal{% endblock %}</title>
<style>
body { background: #101418; color: #eee; font-family: serif; margin: 0; } main { max-width: 60rem; margin: 0 auto; }
table { border-collapse: separate; border-spacing: 4px; } td, th { padding: 12px; } ul { list-style: square; }
label { display: block; } input { width: 100%; }
</style></head><body data-theme="dark"><div class="nav"><a href="/" style="color:#9cf">Portal</a></div>
<main>{% block content %}{% endblock %}</main></body></html>"""

#: A sidebar beside the content, in a flex box that does not shrink by itself.
SIDEBAR = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{% block title %}Energy{% endblock %}</title>
<style>
body { margin: 0; font: 16px/1.6 system-ui; } .wrap { display: flex; flex-wrap: wrap; }
aside { flex: 0 0 200px; padding: 16px; background: #f3f3f3; } .content { flex: 1 1 320px; min-width: 0; padding: 0; }
form { display: block; } fieldset { border: 2px groove; } summary { list-style: none; } code { background: #fdd; }
</style>{% block head %}{% endblock %}</head><body><div class="wrap"><aside><a href="/">Energy</a></aside>
<div class="content">{% block content %}{% endblock %}</div></div></body></html>"""

LAYOUTS = {"admin": ADMIN, "dark": DARK, "sidebar": SIDEBAR}


def host_names() -> dict[str, object]:
    """Return what a host's context processor gives to its layout."""
    return {
        "now": datetime.now,
        "q": "own q",
        "filter": "own filter",
        "text": "own text",
        "section": "own section",
    }
