"""Checks a Serve config as Serve itself would, without a cluster: `python -m deployments.check`.

The config comes as JSON on stdin. What was found goes to stdout as one JSON object: the
applications as Serve will keep them, or the setting that is wrong. A process of its own, because
it imports whatever the config names, an engine among it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from serve_app.deploy.config import GATEWAY, offered_models
from serve_app.errors import CompAIError, ConfigError


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Return the applications as Serve will keep them, and what their code makes.

    Raises:
        ConfigError: names the setting, the value and what is allowed.
    """
    schema = _parsed(config)
    built = {app.name: _built(app) for app in schema.applications}
    _check_offer(config)
    return {"applications": [_kept(app, schema) for app in schema.applications], "built": built}


def _parsed(config: dict[str, Any]) -> ServeDeploySchema:
    try:
        return ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "config"
        raise ConfigError(place, first["input"], first["msg"]) from None


def _built(app: ServeApplicationSchema) -> dict[str, int]:
    """Return the deployments that the code of `app` makes, each with its surge."""
    where = f"applications.{app.name}"
    try:
        build = import_attr(app.import_path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}.import_path", app.import_path, str(error)) from None
    check_args = getattr(sys.modules[build.__module__], "check", None)
    try:
        built = build_app(build(app.args), name=app.name)
        if check_args is not None:
            check_args(app.args)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error.setting}", error.value, error.allowed) from None
    known = {one.name: one._deployment_config.max_surge_percent for one in built.deployments}
    for deployment in app.deployments:
        if deployment.name not in known:
            allowed = f"one of its deployments: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}.deployments.name", deployment.name, allowed)
    return known


def _check_offer(config: dict[str, Any]) -> None:
    names = {app["name"] for app in config["applications"]}
    for number, model in enumerate(offered_models(config)):
        if model.app not in names:
            place = f"{GATEWAY}.user_config.models.{number}.app"
            raise ConfigError(place, model.app, f"an application: {', '.join(sorted(names))}")


def _kept(app: ServeApplicationSchema, schema: ServeDeploySchema) -> dict[str, Any]:
    # As the controller does before it keeps them.
    if app.logging_config is None and schema.logging_config:
        app.logging_config = schema.logging_config
    kept: dict[str, Any] = app.model_dump(mode="json", exclude_unset=True)
    return kept


def main() -> None:
    """Read, check, answer."""
    answer = os.fdopen(os.dup(1), "w")
    # An engine that is imported may print.
    os.dup2(2, 1)
    try:
        told = check(json.load(sys.stdin))
    except ConfigError as error:
        told = {"setting": error.setting, "value": error.value, "allowed": error.allowed}
    except CompAIError as error:
        told = {"failed": error.message}
    with answer:
        json.dump(told, answer, default=str)


if __name__ == "__main__":
    main()
