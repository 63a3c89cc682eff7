"""A Serve config as plain data: what runs, what is offered, how to tell two of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import orjson

from serve_app.config import GatewayConfig, ModelEntry, parse_config

# Both as Serve keeps them: only what was said, nothing filled in.
ServeConfig: TypeAlias = dict[str, Any]
Application: TypeAlias = dict[str, Any]

GATEWAY = "Gateway"


def fingerprint(applications: Sequence[Application]) -> str:
    """Return the SHA-256 by which the same applications are known again, in any order."""
    ordered = sorted(applications, key=lambda app: str(app["name"]))
    return hashlib.sha256(orjson.dumps(ordered, option=orjson.OPT_SORT_KEYS)).hexdigest()


def offered_models(config: ServeConfig) -> Sequence[ModelEntry]:
    """Return the models of the gateway's policy; none where no gateway is among the applications.

    Raises:
        ConfigError: the policy is wrong.
    """
    for app in config["applications"]:
        for deployment in app.get("deployments") or ():
            if deployment["name"] == GATEWAY:
                where = f"{app['name']}.{GATEWAY}.user_config"
                return parse_config(GatewayConfig, deployment.get("user_config"), where).models
    return ()
