"""Further issuers, from the YAML file that COMP_AI_OIDC_ISSUERS names.

The file holds no secret: an entry names the variable or the file that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import yaml
from pydantic import (
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from serve_app.errors import ConfigError

SETTING = "COMP_AI_OIDC_ISSUERS"
ONE_INTROSPECTION = (
    "introspection at one issuer only, the one of the environment included: an opaque token does "
    "not say whose it is"
)

_Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FurtherIssuer(_Entry):
    """One further issuer whose access tokens are accepted."""

    name: _Name = Field(
        description="It is put with a colon before the ids, groups, roles and clients of its "
        "tokens, so that they are never those of another issuer."
    )
    issuer: AnyHttpUrl = Field(description="The `iss` of its tokens.")
    discovery_url: AnyHttpUrl | None = Field(
        default=None, description="Where its discovery document is, if not below `issuer`."
    )
    audience: str = Field(
        default="comp-ai-service", min_length=1, description="Value that `aud` must hold."
    )
    client_id: str = Field(
        default="comp-ai-service",
        min_length=1,
        description="Our client there: its client roles count, and introspection asks as it.",
    )
    authorized_parties: tuple[str, ...] = Field(
        default=(), description="Clients (`azp`) whose tokens are accepted; empty accepts all."
    )
    permissions: tuple[Literal["comp-ai:user", "comp-ai:admin", "comp-ai:auditor"], ...] = Field(
        default=("comp-ai:user",), description="Permissions that its tokens may give."
    )
    introspection: bool = Field(
        default=False,
        description="Ask it about opaque tokens. One issuer only may have this, the one of the "
        "environment included: an opaque token does not say whose it is, and must not be shown "
        "to another issuer.",
    )
    client_secret_env: str | None = Field(
        default=None, description="Variable that holds the secret of `client_id`."
    )
    client_secret_file: Path | None = Field(
        default=None, description="File that holds it, instead."
    )

    @field_validator("name")
    @classmethod
    def _not_ours(cls, name: str) -> str:
        if name == "comp-ai":
            raise ValueError("another name: this one stands before our own roles")
        return name

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        given = [self.client_secret_env, self.client_secret_file]
        if self.introspection and given.count(None) != 1:
            raise ValueError(
                "introspection wants either client_secret_env or client_secret_file beside it"
            )
        return self


class _File(_Entry):
    issuers: tuple[FurtherIssuer, ...]


@dataclass(frozen=True, slots=True)
class LoadedIssuer:
    """An entry of the file, with the secret that it leads to."""

    entry: FurtherIssuer
    secret: SecretStr | None

    @property
    def url(self) -> str:
        """Its `iss`, without a slash at its end."""
        return str(self.entry.issuer).rstrip("/")


def load_issuers(
    path: Path, environ: Mapping[str, str], *, taken: Iterable[str] = ()
) -> tuple[LoadedIssuer, ...]:
    """Return the issuers of the file at `path`; `taken` are issuer URLs in use elsewhere.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; names the place, the value
            and what is allowed.
    """
    issuers = tuple(
        LoadedIssuer(entry, _secret_of(entry, environ)) for entry in _parse(path, _read(path))
    )
    names: set[str] = set()
    urls = {url.rstrip("/") for url in taken}
    for index, issuer in enumerate(issuers):
        if issuer.entry.name in names:
            _refuse(f"issuers.{index}.name", issuer.entry.name, "a name that no other issuer has")
        if issuer.url in urls:
            _refuse(f"issuers.{index}.issuer", issuer.url, "an issuer that is named once")
        names.add(issuer.entry.name)
        urls.add(issuer.url)
    return issuers


def _secret_of(entry: FurtherIssuer, environ: Mapping[str, str]) -> SecretStr | None:
    if not entry.introspection:
        return None
    if entry.client_secret_file is not None:
        place, where = f"{entry.name}.client_secret_file", str(entry.client_secret_file)
        secret = _read_text(entry.client_secret_file, place)
    else:
        place, where = f"{entry.name}.client_secret_env", str(entry.client_secret_env)
        secret = environ.get(where, "")
    if not secret.strip():
        _refuse(place, where, "the name of one that holds a secret")
    return SecretStr(secret.strip())


def _read(path: Path) -> object:
    text = _read_text(path, None)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise ConfigError(SETTING, str(path), f"a file of YAML{where}") from None


def _read_text(path: Path, place: str | None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"a readable file of UTF-8 text ({type(error).__name__})"
        raise ConfigError(_place(place), str(path), allowed) from None


def _parse(path: Path, raw: object) -> tuple[FurtherIssuer, ...]:
    if not isinstance(raw, dict):
        raise ConfigError(SETTING, str(path), "a mapping with a list `issuers`")
    try:
        return _File.model_validate(raw).issuers
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(".".join(map(str, first["loc"])), _shown(first), first["msg"])


def _shown(error: Any) -> object:
    """Return the value of a mistake, unless it may be or hold a secret."""
    if error["type"] == "missing":
        return None
    if "secret" in str(error["loc"]) or isinstance(error["input"], dict):
        return "(hidden)"
    return error["input"]


def _refuse(place: str, value: object, allowed: str) -> NoReturn:
    raise ConfigError(_place(place), value, allowed)


def _place(place: str | None) -> str:
    return SETTING if place is None else f"{SETTING}: {place}"
