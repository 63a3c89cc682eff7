"""Settings that differ from one installation to the next: read once from the environment.

Policy (models, limits, deadlines) is not here: it lives in the Serve config YAML, see
`serve_app.config`. A secret `NAME` may also be given as `NAME_FILE`, the path of a file
that holds it. Nothing is read at import: call `load_settings()` once and pass the result.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from serve_app.errors import ConfigError
from serve_app.identity.issuers_file import ONE_INTROSPECTION, LoadedIssuer, load_issuers
from serve_app.node_ports import NodePorts

Port = Annotated[int, Field(ge=1, le=65535)]
_Group = TypeVar("_Group", bound=BaseModel)


_PORTS_SCHEMA = {"type": "string", "pattern": "^[0-9]+-[0-9]+$"}


def _node_ports(given: object) -> object:
    return NodePorts.parse(given) if isinstance(given, str) else given


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
        description="Address that nginx listens on. `0.0.0.0` opens the service to the network.",
    )
    http_port: Port = Field(
        default=8080, alias="COMP_AI_HTTP_PORT", description="Port that nginx listens on."
    )
    port: Port = Field(
        default=3002,
        alias="COMP_AI_PORT",
        description="Port behind nginx, of HAProxy or of Serve's own proxy. Never publish it. "
        "Under `comp-ai up` it replaces the port in the YAML.",
    )
    haproxy: bool = Field(
        default=True,
        alias="COMP_AI_HAPROXY",
        description="Whether [HAProxy](architecture.md#haproxy) brings requests to the gateways, "
        "on every node, or Serve's own proxy, at up to twice the CPU time. The same on all nodes "
        "of a cluster.",
    )
    fallback_port: Port = Field(
        default=3004,
        alias="COMP_AI_FALLBACK_PORT",
        description="With HAProxy, port of Serve's own proxy on the head, which HAProxy asks "
        "while no gateway can be reached. Never publish it.",
    )
    issuer_port: Port = Field(
        default=3003,
        alias="COMP_AI_ISSUER_PORT",
        description="Port of the local token issuer that `comp-ai up` starts where no issuer is "
        "configured.",
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
        description="Port on which Ray exports metrics for Prometheus, on all addresses of the "
        "machine.",
    )
    ray_head: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$",
        alias="COMP_AI_RAY_HEAD",
        description="Host and port of the Ray head that `comp-ai worker` joins.",
    )
    ray_token: SecretStr | None = Field(
        default=None,
        alias="COMP_AI_RAY_TOKEN",
        description="Token of the Ray cluster, for `comp-ai head` and `comp-ai worker`: the "
        "same on every node. A head without it makes one in its data folder.",
        min_length=32,
    )
    node_address: str | None = Field(
        default=None,
        alias="COMP_AI_NODE_ADDRESS",
        description="Address by which other nodes and Prometheus reach this one, for "
        "`comp-ai head` and `comp-ai worker`; Ray finds it out where it is not set.",
    )
    node_ports: Annotated[
        NodePorts | None, BeforeValidator(_node_ports), WithJsonSchema(_PORTS_SCHEMA)
    ] = Field(
        default=None,
        alias="COMP_AI_NODE_PORTS",
        description="Range that Ray and the replicas of this node take their ports from, "
        "as `20000-20999`, at least 100 ports; any free ports where it is not set. "
        "What each is stands in [deployment](deployment.md#ports-and-firewall).",
    )
    ray_store: Path | None = Field(
        default=None,
        alias="COMP_AI_RAY_STORE",
        description="Folder in which `comp-ai head` keeps Ray's control store, so that workers "
        "and applications go on when the head is started again; in memory where it is not set. "
        "It wants `COMP_AI_NODE_ADDRESS`, and a disk that outlives the container.",
    )
    head_away_s: float = Field(
        default=1800.0,
        ge=10,
        le=7 * 24 * 3600.0,
        alias="COMP_AI_HEAD_AWAY_S",
        description="How long a worker goes on without its head before it ends what runs on it.",
    )
    drain_s: float = Field(
        default=660.0,
        ge=0,
        le=24 * 3600.0,
        alias="COMP_AI_DRAIN_S",
        description="How long `comp-ai head` and `comp-ai worker` let requests finish when they "
        "are told to stop. Above the gateway's `deadline_s`.",
    )
    model_path: Path | None = Field(
        default=None,
        alias="COMP_AI_MODEL_PATH",
        description="Folder of model weights; `<COMP_AI_HOME>/models` where it is not set. Give "
        "an absolute path: `~` is not expanded here.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        alias="COMP_AI_API_KEY",
        description="A bootstrap API key with every permission, for the first sign-in. Remove "
        "it once other keys exist.",
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
    user: str = Field(
        default="comp_ai",
        alias="POSTGRES_USER",
        description="Role to log in as. It must own the schema `comp_ai` or be allowed to make "
        "it: it applies migrations and makes monthly partitions.",
    )
    password: SecretStr | None = Field(
        default=None, alias="POSTGRES_PASSWORD", description="Password of the role."
    )
    database: str = Field(default="comp_ai", alias="POSTGRES_DB", description="Database name.")
    sslmode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] = Field(
        default="prefer",
        alias="POSTGRES_SSLMODE",
        description="How the connection is encrypted, in libpq's words. Over networks use "
        "`verify-full`: it alone refuses another host that has a certificate of the same CA. "
        "`verify-ca` and `verify-full` trust the CAs of `POSTGRES_SSLROOTCERT`.",
    )
    sslrootcert: Path | None = Field(
        default=None,
        alias="POSTGRES_SSLROOTCERT",
        description="File of the CAs that `verify-ca` and `verify-full` trust, in PEM. Where "
        "not set, the system's CAs, or those of `SSL_CERT_FILE`. It is read at the start, and "
        "the start fails if it holds no certificate.",
    )
    pool_size: int = Field(
        default=8,
        ge=1,
        le=1000,
        alias="POSTGRES_POOL_SIZE",
        description="Most connections of one gateway for what requests need.",
    )
    batch_pool_size: int = Field(
        default=4,
        # A step of a batch may hold one for minutes; claims must be renewed beside it.
        ge=2,
        le=1000,
        alias="POSTGRES_BATCH_POOL_SIZE",
        description="Most connections of one gateway for the lines of batches, so that those do "
        "not take what requests of users need.",
    )
    read_host: str | None = Field(
        default=None,
        alias="POSTGRES_READ_HOST",
        description="Host name of a read replica, for usage and searches. Role, password, "
        "database and TLS are those of the primary.",
    )
    read_port: Port | None = Field(
        default=None,
        alias="POSTGRES_READ_PORT",
        description="Port of the read replica; `POSTGRES_PORT` where not set.",
    )
    read_pool_size: int = Field(
        default=4,
        ge=1,
        le=1000,
        alias="POSTGRES_READ_POOL_SIZE",
        description="Most connections of one gateway for usage and searches, to the primary and "
        "to the replica each.",
    )
    read_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        alias="POSTGRES_READ_TIMEOUT_S",
        description="Longest time for one statement of usage and searches; it is ended then, "
        "and the answer is 503 `query_too_slow`.",
    )

    @field_validator("sslrootcert")
    @classmethod
    def _holds_certificates(cls, file: Path | None) -> Path | None:
        if file is not None:
            try:
                ssl.create_default_context(cafile=file)
            except OSError as error:  # ssl.SSLError is among its subclasses
                name = type(error).__name__
                raise ValueError(f"a readable file of certificates in PEM ({name})") from None
        return file

    @property
    def read_replica(self) -> PostgresSettings | None:
        """How to reach the read replica, or None where there is none."""
        if self.read_host is None:
            return None
        return self.model_copy(update={"host": self.read_host, "port": self.read_port or self.port})


class OidcSettings(_Settings):
    """The issuer whose access tokens are accepted."""

    keycloak_url: AnyHttpUrl | None = Field(
        default=None,
        alias="KEYCLOAK_URL",
        description="Base URL of Keycloak; with the realm it gives the issuer, "
        "`<url>/realms/<realm>`.",
    )
    keycloak_realm: str = Field(
        default="lianel", alias="KEYCLOAK_REALM", description="Keycloak realm."
    )
    issuer: AnyHttpUrl | None = Field(
        default=None,
        alias="COMP_AI_OIDC_ISSUER",
        description="Issuer URL of any OpenID Connect provider; wins over `KEYCLOAK_URL`.",
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
        description="The secret of that client, for `comp-ai token` and for introspection.",
    )
    authorized_parties: tuple[str, ...] = Field(
        default=(),
        alias="COMP_AI_OIDC_AUTHORIZED_PARTIES",
        description="Clients (`azp`) whose tokens are accepted, separated by commas; "
        "empty accepts every client of the issuer that was given our audience.",
    )
    discovery_url: AnyHttpUrl | None = Field(
        default=None,
        alias="COMP_AI_OIDC_DISCOVERY_URL",
        description="Where the issuer's discovery document is reached, if not at "
        "`<issuer>/.well-known/openid-configuration`: inside a Docker network its address is "
        "often another one than its `iss`. The document must still name the issuer.",
    )
    introspection: bool = Field(
        default=False,
        alias="COMP_AI_OIDC_INTROSPECTION",
        description="Ask the issuer about opaque tokens, as `COMP_AI_KEYCLOAK_CLIENT_ID` with "
        "its secret.",
    )
    issuers_file: Path | None = Field(
        default=None,
        alias="COMP_AI_OIDC_ISSUERS",
        description="Path of a YAML file of further issuers. It must be there on every node.",
    )
    clock_skew_s: float = Field(
        default=30.0,
        ge=0,
        le=300,
        alias="COMP_AI_OIDC_CLOCK_SKEW_S",
        description="How far apart our clock and an issuer's may be.",
    )
    key_refresh_s: float = Field(
        default=300.0,
        ge=1,
        le=24 * 3600.0,
        alias="COMP_AI_OIDC_KEY_REFRESH_S",
        description="How often signing keys are fetched ahead of need.",
    )
    unknown_key_s: float = Field(
        default=5.0,
        ge=1,
        le=300,
        alias="COMP_AI_OIDC_UNKNOWN_KEY_S",
        description="Least time between two fetches for keys that are not known. A token with "
        "such a key waits that long at most.",
    )
    key_outage_s: float = Field(
        default=24 * 3600.0,
        ge=0,
        le=30 * 24 * 3600.0,
        alias="COMP_AI_OIDC_KEY_OUTAGE_S",
        description="How long known keys go on working while their issuer is away.",
    )
    introspection_cache_s: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        alias="COMP_AI_OIDC_INTROSPECTION_CACHE_S",
        description="How long an issuer's answer about an opaque token holds. A token that was "
        "ended there is accepted here that long at most.",
    )
    introspection_outage_s: float = Field(
        default=300.0,
        ge=0,
        le=24 * 3600.0,
        alias="COMP_AI_OIDC_INTROSPECTION_OUTAGE_S",
        description="How long it holds while the issuer is away.",
    )
    introspection_rate: float = Field(
        default=20.0,
        gt=0,
        le=10_000,
        alias="COMP_AI_OIDC_INTROSPECTION_RATE",
        description="Most questions a second, of each gateway, about tokens that the issuer "
        "never called good.",
    )

    @model_validator(mode="after")
    def _introspection_has_its_secret(self) -> Self:
        if self.introspection and self.client_secret is None:
            raise ValueError("COMP_AI_KEYCLOAK_CLIENT_SECRET must be set beside it")
        return self

    @property
    def issuer_url(self) -> str | None:
        """The issuer as it stands in a token's `iss`, or None where OIDC is off."""
        if self.issuer is not None:
            return str(self.issuer).rstrip("/")
        if self.keycloak_url is not None:
            return f"{str(self.keycloak_url).rstrip('/')}/realms/{self.keycloak_realm}"
        return None

    @property
    def discovery_address(self) -> str | None:
        """Where its discovery document is, or None where it is below the issuer's own URL."""
        return None if self.discovery_url is None else str(self.discovery_url)


class SealingSettings(_Settings):
    """With what the texts of requests are encrypted at rest."""

    master_key: SecretStr | None = Field(
        default=None,
        alias="COMP_AI_MASTER_KEY",
        description="One key or more, each the base64 of 32 bytes, with lines or commas "
        "between: the first wraps the keys of subjects, the others still open what they "
        "wrapped. `comp-ai master-key new` makes one.",
    )


class BackupSettings(_Settings):
    """Where backups of the accounts lie, and which of them are kept."""

    folder: Path | None = Field(
        default=None,
        alias="COMP_AI_BACKUP_PATH",
        description="Folder of the backups; `<COMP_AI_HOME>/backups` where it is not set. Put "
        "it on another disk than the database, and keep it for one installation.",
    )
    programs: Path | None = Field(
        default=None,
        alias="COMP_AI_BACKUP_PROGRAMS",
        description="Folder of pg_dump and pg_restore, not older than the server. Where it is "
        "not set, those of the embedded server are taken, or with `POSTGRES_HOST` those of "
        "`PATH` if it has any.",
    )
    daily: int = Field(
        default=7,
        ge=0,
        le=10_000,
        alias="COMP_AI_BACKUP_DAILY",
        description="Days that keep their newest backup, of those that have one.",
    )
    weekly: int = Field(
        default=4,
        ge=0,
        le=10_000,
        alias="COMP_AI_BACKUP_WEEKLY",
        description="ISO weeks that keep their newest backup.",
    )
    monthly: int = Field(
        default=12,
        ge=0,
        le=10_000,
        alias="COMP_AI_BACKUP_MONTHLY",
        description="Months that keep their newest backup.",
    )

    def path_below(self, home: Path) -> Path:
        """Return the folder of the backups of an installation whose data is in `home`."""
        return home / "backups" if self.folder is None else self.folder.expanduser().resolve()


class TracingSettings(_Settings):
    """Where traces go, and of how many requests. Without an endpoint there are none."""

    endpoint: AnyHttpUrl | None = Field(
        default=None,
        alias="COMP_AI_TRACING_ENDPOINT",
        description="Address of a collector of traces that takes OTLP over HTTP, such as "
        "`http://tempo:4318`; without a path `/v1/traces` is meant. No credential may stand in it. "
        "Tracing is off where it is not set.",
    )
    ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        alias="COMP_AI_TRACING_RATIO",
        description="Share of requests that are traced, drawn by chance.",
    )
    service: str = Field(
        default="comp-ai",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        alias="COMP_AI_TRACING_SERVICE",
        description="Begin of the service names in traces: `-gateway`, `-model`, `-engine` and "
        "`-request-log` follow.",
    )
    trust_parents: bool = Field(
        default=False,
        alias="COMP_AI_TRACING_TRUST_PARENTS",
        description="Trace every request whose `traceparent` says that its sender traces it, "
        "whatever the ratio. Only where all who can reach nginx are your own services.",
    )

    @field_validator("endpoint")
    @classmethod
    def _holds_no_credential(cls, url: AnyHttpUrl | None) -> AnyHttpUrl | None:
        # The exporter names the address in what it logs.
        if url is not None and (url.username or url.password or url.query or url.fragment):
            raise ValueError(
                "host, port and path alone; credentials go into the exporter's headers"
            )
        return url

    @property
    def url(self) -> str | None:
        """Where spans are posted to, or None where tracing is off."""
        if self.endpoint is None:
            return None
        bare = self.endpoint.path in (None, "", "/")
        return str(self.endpoint).rstrip("/") + ("/v1/traces" if bare else "")


class Settings(_Settings):
    """All settings of one process."""

    service: ServiceSettings = ServiceSettings()
    postgres: PostgresSettings = PostgresSettings()
    oidc: OidcSettings = OidcSettings()
    sealing: SealingSettings = SealingSettings()
    backup: BackupSettings = BackupSettings()
    tracing: TracingSettings = TracingSettings()
    further_issuers: tuple[LoadedIssuer, ...] = ()


GROUPS: dict[str, type[BaseModel]] = {
    "service": ServiceSettings,
    "postgres": PostgresSettings,
    "oidc": OidcSettings,
    "sealing": SealingSettings,
    "backup": BackupSettings,
    "tracing": TracingSettings,
}


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read all settings from `environ` (default: the process environment).

    Raises:
        ConfigError: if a value is not allowed; names the variable and what is allowed.
    """
    env = os.environ if environ is None else environ
    oidc = _load(OidcSettings, env)
    return Settings(
        service=_load(ServiceSettings, env),
        postgres=_load(PostgresSettings, env),
        oidc=oidc,
        sealing=_load(SealingSettings, env),
        backup=_load(BackupSettings, env),
        tracing=_load(TracingSettings, env),
        further_issuers=_load_issuers(oidc, env),
    )


def _load_issuers(oidc: OidcSettings, env: Mapping[str, str]) -> tuple[LoadedIssuer, ...]:
    if oidc.issuers_file is None:
        return ()
    taken = [] if oidc.issuer_url is None else [oidc.issuer_url]
    issuers = load_issuers(oidc.issuers_file, env, taken=taken)
    asked = [oidc.introspection, *(issuer.entry.introspection for issuer in issuers)]
    if sum(asked) > 1:
        raise ConfigError("COMP_AI_OIDC_ISSUERS", str(oidc.issuers_file), ONE_INTROSPECTION)
    return issuers


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
        if not first["loc"]:
            raise ConfigError("COMP_AI_OIDC_INTROSPECTION", True, first["msg"]) from None
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
