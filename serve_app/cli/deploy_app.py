"""`comp-ai deploy`, `comp-ai rollback` and `comp-ai deploys`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve_app.settings import Settings

app = typer.Typer()

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanOption = Annotated[bool, typer.Option("--plan", help="Only say what would change.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DowntimeOption = Annotated[
    bool, typer.Option("--allow-downtime", help="Also where somebody is not served meanwhile.")
]
RolloutTimeoutOption = Annotated[
    float, typer.Option(help="How long all replicas may take to run.", min=1, max=86_400)
]
SmokeTimeoutOption = Annotated[
    float, typer.Option(help="How long a model may take to its first good answer.", min=1, max=3600)
]
UrlOption = Annotated[
    str | None, typer.Option(help="Where the smoke test asks; nginx of this machine.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option(help="File of the API key for it; COMP_AI_API_KEY, the first key.")
]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray's dashboard on the head; that of this machine.")
]


@app.command()
def deploy(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Serve config YAML.")],
    plan: PlanOption = False,
    sure: YesOption = False,
    allow_downtime: DowntimeOption = False,
    timeout_s: RolloutTimeoutOption = 1800,
    smoke_timeout_s: SmokeTimeoutOption = 120,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    address: AddressOption = None,
) -> None:
    """Change what a running service serves; goes back by itself if that does not serve.

    Exit code 3 if `--plan` finds something to do.
    """
    from serve_app.cli import deploy as cli

    options = cli.Options(
        plan_only=plan,
        sure=sure,
        allow_downtime=allow_downtime,
        timeout_s=timeout_s,
        smoke_timeout_s=smoke_timeout_s,
        url=url,
        key_file=key_file,
        address=address,
    )
    raise typer.Exit(asyncio.run(cli.deploy(_settings(), config, options)))


@app.command()
def rollback(
    to: Annotated[
        int | None, typer.Option(help="Number of a deployment; the one before what runs.", min=1)
    ] = None,
    plan: PlanOption = False,
    sure: YesOption = False,
    allow_downtime: DowntimeOption = False,
    timeout_s: RolloutTimeoutOption = 1800,
    smoke_timeout_s: SmokeTimeoutOption = 120,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    address: AddressOption = None,
) -> None:
    """Deploy again what served before what runs now."""
    from serve_app.cli import deploy as cli

    options = cli.Options(
        plan_only=plan,
        sure=sure,
        allow_downtime=allow_downtime,
        timeout_s=timeout_s,
        smoke_timeout_s=smoke_timeout_s,
        url=url,
        key_file=key_file,
        address=address,
    )
    raise typer.Exit(asyncio.run(cli.roll_back(_settings(), to, options)))


@app.command()
def deploys(as_json: JsonOption = False) -> None:
    """List what was deployed from this data folder, the latest last."""
    from serve_app.cli import deploy as cli

    cli.show(_settings(), as_json=as_json)


def _settings() -> Settings:
    from serve_app.settings import load_settings

    return load_settings()
