"""The database side of a start: which PostgreSQL, migrations, the first API key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from serve_app.accounts.sealing import master_keys
from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.audit.act import SERVICE_ITSELF, Actor
from serve_app.database import create_pool, migrate
from serve_app.errors import ConfigError, IdentityUnavailable
from serve_app.identity.api_keys import ApiKeyStore, KeyTerms, prefix_of
from serve_app.lazy_pool import LazyPool
from serve_app.records import utc_now
from serve_app.settings import PostgresSettings, Settings
from serve_app.stack.home import Home, write_secret
from serve_app.stack.postgres import EmbeddedPostgres

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
FIRST_KEY_OWNER = "first-start"
_UP = Actor(id="comp-ai up", kind=SERVICE_ITSELF)


def is_embedded(environ: Mapping[str, str]) -> bool:
    """Tell whether `up` runs its own PostgreSQL: where no other one is named."""
    return not environ.get("POSTGRES_HOST")


def postgres_settings(
    settings: Settings, home: Home, environ: Mapping[str, str]
) -> PostgresSettings:
    """Return how to reach the accounts: the embedded server or the one in the settings.

    Raises:
        ConfigError: the embedded server was never prepared.
    """
    if is_embedded(environ):
        return EmbeddedPostgres(home.path).settings()
    return settings.postgres


def postgres_environment(settings: PostgresSettings, home: Home) -> dict[str, str]:
    """Return the variables by which a replica finds the embedded server."""
    return {
        "POSTGRES_HOST": settings.host,
        "POSTGRES_PORT": str(settings.port),
        "POSTGRES_USER": settings.user,
        # By file: an environment is easier to read for others than a file is.
        "POSTGRES_PASSWORD_FILE": str(home.path / "postgres" / "password"),
        "POSTGRES_DB": settings.database,
        "POSTGRES_SSLMODE": settings.sslmode,
    }


def names_master_key(environ: Mapping[str, str]) -> bool:
    """Tell whether the settings name the master keys; if not, the data folder holds them."""
    return bool(environ.get(master_keys.SETTING) or environ.get(f"{master_keys.SETTING}_FILE"))


def master_key_environment(home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a replica finds the master keys, making the first one.

    Raises:
        ConfigError: the file of the data folder holds none.
    """
    if names_master_key(environ):
        return {}
    if not home.master_key.exists():
        write_secret(home.master_key, master_keys.new_master_key() + "\n")
    master_keys_of(Settings(), home, environ)
    # By file: an environment is easier to read for others than a file is.
    return {f"{master_keys.SETTING}_FILE": str(home.master_key)}


def master_keys_of(settings: Settings, home: Home, environ: Mapping[str, str]) -> MasterKeys:
    """Return the master keys: of the settings, or of the data folder.

    Raises:
        ConfigError: there is none, or what is there is none.
    """
    if names_master_key(environ):
        return MasterKeys.of(settings.sealing)
    try:
        return MasterKeys.parse(home.master_key.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        allowed = f"set, or a file {home.master_key}, which the first `comp-ai up` makes"
        raise ConfigError(master_keys.SETTING, None, allowed) from None


@asynccontextmanager
async def key_store(settings: PostgresSettings) -> AsyncIterator[ApiKeyStore]:
    """Lend the table of API keys."""
    pool = LazyPool(
        lambda: create_pool(settings, min_size=0, max_size=2, application_name="comp-ai"),
        unavailable=IdentityUnavailable,
        name="identity",
    )
    try:
        yield ApiKeyStore(pool)
    finally:
        await pool.close()


async def apply_migrations(settings: PostgresSettings) -> int:
    """Bring the schema up to date; return how many migrations were applied."""
    return len(await migrate(settings, directory=MIGRATIONS, actor=_UP))


async def first_key(settings: PostgresSettings, home: Home) -> str:
    """Return the key of the first start, making one where there is none that works."""
    async with key_store(settings) as store:
        if home.first_key.exists():
            plain = home.first_key.read_text(encoding="ascii").strip()
            if await _works(store, plain):
                return plain
        terms = KeyTerms(name="made by the first start")
        plain, _ = await store.create(terms, owner=FIRST_KEY_OWNER, by=_UP)
    write_secret(home.first_key, plain)
    return plain


async def _works(store: ApiKeyStore, plain: str) -> bool:
    prefix = prefix_of(plain)
    if prefix is None:
        return False
    key = (await store.find([prefix])).get(prefix)
    return key is not None and key.is_valid(utc_now())
