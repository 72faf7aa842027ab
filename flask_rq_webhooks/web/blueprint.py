"""The blueprint, mounted under every host name where the app chooses routes by host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Blueprint, request
from flask.blueprints import BlueprintSetupState
from flask.sansio.app import App

#: Part of each rule in an app with ``host_matching=True``, which has no rules without a host.
HOST_PART = "rqw_host"


class WebhookBlueprint(Blueprint):
    """A blueprint whose routes answer under any host name, also with ``host_matching=True``."""

    def register(self, app: App, options: dict[str, Any]) -> None:
        """Add everything to *app*."""
        if app.url_map.host_matching:
            self.url_value_preprocessor(_forget_host)
            self.url_defaults(_add_host)
        super().register(app, options)

    def make_setup_state(
        self, app: App, options: dict[str, Any], first_registration: bool = False
    ) -> BlueprintSetupState:
        """Return what adds the rules to *app*."""
        setup = _AnyHostSetup if app.url_map.host_matching else BlueprintSetupState
        return setup(self, app, options, first_registration)


class _AnyHostSetup(BlueprintSetupState):
    def add_url_rule(
        self,
        rule: str,
        endpoint: str | None = None,
        view_func: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        super().add_url_rule(rule, endpoint, view_func, host=f"<{HOST_PART}>", **options)


def _forget_host(_endpoint: str | None, values: dict[str, Any] | None) -> None:
    if values is not None:
        values.pop(HOST_PART, None)


def _add_host(_endpoint: str, values: dict[str, Any]) -> None:
    values.setdefault(HOST_PART, request.host)
