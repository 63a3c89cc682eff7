"""Settings that differ from one installation to the next: read once from the environment.

Policy (models, limits, deadlines) is not here: it lives in the Serve config YAML, see
`serve_app.config`. A secret `NAME` may also be given as `NAME_FILE`, the path of a file
that holds it. Nothing is read at import: call `load_settings()` once and pass the result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AnyHttpUrl, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from serve_app.errors import ConfigError

Port = Annotated[int, Field(ge=1, le=65535)]
_Group = TypeVar("_Group", bound=BaseModel)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServiceSettings(_Settings):
    """Where this installation keeps its data and which addresses it uses."""

    home: Path = Field(
        default=Path("~/.comp-ai"),
        alias="COMP_AI_HOME",
        description="Folder of all data: database, request spool, models, keys, logs.",
    )
    http_host: str = Field(
        default="127.0.0.1",
        alias="COMP_AI_HTTP_HOST",
        description="Address that nginx listens on.",
    )
    http_port: Port = Field(
        default=8080, alias="COMP_AI_HTTP_PORT", description="Port that nginx listens on."
    )
    port: Port = Field(
        default=3002,
        alias="COMP_AI_PORT",
        description="Port of the Serve proxy behind nginx. Never publish it.",
    )
    issuer_port: Port = Field(
        default=3003,
        alias="COMP_AI_ISSUER_PORT",
        description="Port of the local token issuer that `comp-ai up` starts.",
    )
    ray_port: Port = Field(
        default=6379, alias="COMP_AI_RAY_PORT", description="Port of Ray's control store."
    )
    dashboard_port: Port = Field(
        default=8265,
        alias="COMP_AI_DASHBOARD_PORT",
        description="Port of Ray's dashboard and of Serve's deploy API, on 127.0.0.1.",
    )
    metrics_port: Port = Field(
        default=8090,
        alias="COMP_AI_METRICS_PORT",
        description="Port on which Ray exports metrics for Prometheus.",
    )
    model_path: Path | None = Field(
        default=None,
        alias="COMP_AI_MODEL_PATH",
        description="Folder of model weights; `<COMP_AI_HOME>/models` where it is not set.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        alias="COMP_AI_API_KEY",
        description="A bootstrap API key with every permission, for the first sign-in. "
        "At least 32 characters; remove it once other keys exist.",
        min_length=32,
    )
    max_tokens: int = Field(
        default=4096,
        ge=1,
        alias="COMP_AI_MAX_TOKENS",
        description="Most completion tokens that one request may ask for, "
        "where the model's own entry says nothing.",
    )
    temperature: float = Field(
        default=0.7,
        ge=0,
        le=2,
        alias="COMP_AI_TEMPERATURE",
        description="Sampling temperature of a request that names none.",
    )

    @property
    def home_path(self) -> Path:
        """The data folder, `~` expanded."""
        return self.home.expanduser().resolve()

    @property
    def models_path(self) -> Path:
        """The folder of model weights."""
        return self.model_path.expanduser() if self.model_path else self.home_path / "models"


class PostgresSettings(_Settings):
    """The database of the accounts."""

    host: str = Field(
        default="127.0.0.1",
        alias="POSTGRES_HOST",
        description="Host name, or the folder of a Unix socket.",
    )
    port: Port = Field(default=5432, alias="POSTGRES_PORT", description="Port.")
    user: str = Field(default="comp_ai", alias="POSTGRES_USER", description="Role to log in as.")
    password: SecretStr | None = Field(
        default=None, alias="POSTGRES_PASSWORD", description="Password of the role."
    )
    database: str = Field(default="comp_ai", alias="POSTGRES_DB", description="Database name.")
    sslmode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] = Field(
        default="prefer",
        alias="POSTGRES_SSLMODE",
        description="How the connection is encrypted, in libpq's words.",
    )


class OidcSettings(_Settings):
    """The issuer whose access tokens are accepted."""

    keycloak_url: AnyHttpUrl | None = Field(
        default=None,
        alias="KEYCLOAK_URL",
        description="Base URL of Keycloak; with the realm it gives the issuer.",
    )
    keycloak_realm: str = Field(
        default="lianel", alias="KEYCLOAK_REALM", description="Keycloak realm."
    )
    issuer: AnyHttpUrl | None = Field(
        default=None,
        alias="COMP_AI_OIDC_ISSUER",
        description="Issuer URL of any OpenID Connect provider; wins over KEYCLOAK_URL.",
    )
    audience: str = Field(
        default="comp-ai-service",
        alias="COMP_AI_OIDC_AUDIENCE",
        description="Value that a token's `aud` claim must hold.",
    )
    client_id: str = Field(
        default="comp-ai-service",
        alias="COMP_AI_KEYCLOAK_CLIENT_ID",
        description="Our client at the issuer; its client roles become permissions.",
    )
    client_secret: SecretStr | None = Field(
        default=None,
        alias="COMP_AI_KEYCLOAK_CLIENT_SECRET",
        description="Secret of that client, for `comp-ai token`.",
    )
    authorized_parties: tuple[str, ...] = Field(
        default=(),
        alias="COMP_AI_OIDC_AUTHORIZED_PARTIES",
        description="Clients (`azp`) whose tokens are accepted, separated by commas; "
        "empty accepts every client of the issuer that was given our audience.",
    )

    @property
    def issuer_url(self) -> str | None:
        """The issuer as it stands in a token's `iss`, or None where OIDC is off."""
        if self.issuer is not None:
            return str(self.issuer).rstrip("/")
        if self.keycloak_url is not None:
            return f"{str(self.keycloak_url).rstrip('/')}/realms/{self.keycloak_realm}"
        return None


class Settings(_Settings):
    """All settings of one process."""

    service: ServiceSettings = ServiceSettings()
    postgres: PostgresSettings = PostgresSettings()
    oidc: OidcSettings = OidcSettings()


GROUPS: dict[str, type[BaseModel]] = {
    "service": ServiceSettings,
    "postgres": PostgresSettings,
    "oidc": OidcSettings,
}


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read all settings from `environ` (default: the process environment).

    Raises:
        ConfigError: if a value is not allowed; names the variable and what is allowed.
    """
    env = os.environ if environ is None else environ
    return Settings(
        service=_load(ServiceSettings, env),
        postgres=_load(PostgresSettings, env),
        oidc=_load(OidcSettings, env),
    )


def _load(group: type[_Group], env: Mapping[str, str]) -> _Group:
    values: dict[str, object] = {}
    for field in group.model_fields.values():
        name = str(field.alias)
        raw = _read(name, env, secret=_is_secret(field.annotation))
        if raw is not None:
            values[name] = _split(raw) if field.annotation == tuple[str, ...] else raw
    try:
        return group.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        secret = any(
            f.alias == name and _is_secret(f.annotation) for f in group.model_fields.values()
        )
        shown = "(hidden)" if secret else first["input"]
        raise ConfigError(name, shown, first["msg"]) from None


def _read(name: str, env: Mapping[str, str], *, secret: bool) -> str | None:
    if secret and (path := env.get(f"{name}_FILE")):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{name}_FILE", path, f"a readable file of UTF-8 text ({type(error).__name__})"
            ) from None
    return env.get(name) or None


def _is_secret(annotation: object) -> bool:
    return "SecretStr" in str(annotation)


def _split(raw: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in raw.split(",") if part.strip())
