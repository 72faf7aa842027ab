"""The directive ``rq-webhooks-commands``: the help of every command, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from flask_rq_webhooks.cli import cli


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, str]]:
    """Give (command line, help text) of every command below *group*, in alphabetical order."""
    for name, command in sorted(group.commands.items()):
        inner = click.Context(
            command, info_name=name, parent=context, terminal_width=90, max_content_width=90
        )
        if isinstance(command, click.Group):
            yield from commands(command, inner)
        else:
            yield inner.command_path, command.get_help(inner)


class CommandHelp(Directive):
    """One section per command, with its ``--help``."""

    def run(self) -> list[nodes.Node]:
        sections: list[nodes.Node] = []
        parent = click.Context(click.Group("flask"), info_name="flask")
        context = click.Context(cli, info_name="rq-webhooks", parent=parent)
        for path, text in commands(cli, context):
            section = nodes.section(ids=[nodes.make_id(path)])
            title = path.removeprefix("flask rq-webhooks ")
            section += nodes.title(title, title)
            block = nodes.literal_block(text, text)
            block["language"] = "text"
            section += block
            sections.append(section)
        return sections


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("rq-webhooks-commands", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
