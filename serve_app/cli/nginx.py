"""`comp-ai nginx`: what the command does and prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from serve_app.errors import ConfigError
from serve_app.settings import Settings
from serve_app.stack import nginx
from serve_app.stack.placeholder_certificate import make_missing


def write(
    settings: Settings, environ: Mapping[str, str], folder: Path, placeholder: str | None
) -> None:
    """Write nginx's configuration into `folder`, and a certificate for `placeholder` if missing.

    Raises:
        ConfigError: a value is not allowed, or the folder cannot be written.
    """
    values = nginx.values_from(environ)
    service = settings.service
    token = None if service.ray_token is None else service.ray_token.get_secret_value()
    try:
        nginx.write(values, folder, drain_s=service.drain_s, ray_token=token)
        if placeholder is not None:
            _make_placeholder(values, placeholder)
    except OSError as error:
        raise ConfigError("FOLDER", str(folder), f"a folder to write ({error})") from error
    typer.echo(f"written: {folder}/nginx.conf")


def _make_placeholder(values: Mapping[str, str], host: str) -> None:
    certificate = values.get("COMP_AI_NGINX_TLS_CERTIFICATE")
    key = values.get("COMP_AI_NGINX_TLS_KEY")
    if certificate is None or key is None:
        raise ConfigError("COMP_AI_NGINX_TLS_CERTIFICATE", certificate, "set, and its key")
    if make_missing(Path(certificate), Path(key), host):
        typer.echo(f"made: a placeholder for {host} at {certificate}")
