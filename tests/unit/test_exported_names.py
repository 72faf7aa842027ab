"""The public names: what users import, and nothing they do not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flask_rq_webhooks
from flask_rq_webhooks import errors

PUBLIC = {
    "BlockedURLError",
    "ConfigurationError",
    "InvalidWebhookError",
    "Queue",
    "RQWebhooks",
    "RQWebhooksError",
    "SignatureError",
    "StorageUnavailableError",
    "__version__",
}


def test_all() -> None:
    assert set(flask_rq_webhooks.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_can_be_had(name: str) -> None:
    assert getattr(flask_rq_webhooks, name) is not None
    assert name in dir(flask_rq_webhooks)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Webhooks'"):
        flask_rq_webhooks.Webhooks  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(flask_rq_webhooks.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == PUBLIC


def test_importing_the_package_loads_none_of_its_dependencies() -> None:
    code = (
        "import sys, flask_rq_webhooks\n"
        "heavy = 'flask sqlalchemy requests rq redis marshmallow cryptography limits'.split()\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_has_the_one_root_and_a_message_of_its_own() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(classes) == 9
    for error in classes:
        assert issubclass(error, errors.RQWebhooksError)
        assert str(error()) == (error.__doc__ or "").splitlines()[0]
    assert str(errors.BlockedURLError("x", code="userinfo")) == "x"
    assert errors.BlockedURLError(code="userinfo").code == "userinfo"
    assert errors.InvalidWebhookError(details={"webhook_url": ("why",)}).details == {"webhook_url": ["why"]}
