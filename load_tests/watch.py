"""Every alert in a staged failure: a whole stack, watched by the real Prometheus.

    python -m load_tests.watch [--groups GROUP ...] [--out FOLDER]

Starts `comp-ai up` with two gateways and fake engines, Prometheus, Alertmanager and the
exporters of Debian around it, with the project's own configuration. The time of the rules is
shorter by `--factor`, see tests/watching/scaled.py. Then it breaks one thing after another,
waits for its alerts, mends it, and waits until they stop. At last it asks every query of the
dashboards. Exit code 1 where an alert did not fire, or a query has no data.

Wants root, for a small disk. Groups that are not run keep what the results say of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml

from tests.chaos.faults import mount_small_disk, unmount
from tests.stack_runner import start_stack, wait_started
from tests.watching import long_stages as long
from tests.watching.dashboards import questions, without_data
from tests.watching.prometheus import MONITORING, missing_programs, stack_settings, watched
from tests.watching.scaled import FACTOR
from tests.watching.stages import (
    BACKUP,
    CERTIFICATE,
    DOOR,
    ENGINE,
    EXPORTER,
    GPU,
    METRICS,
    SIGN_INS,
    Play,
    Scene,
    Stage,
    wait_healthy,
)
from tests.watching.traffic import all_sorts

RESULTS = Path(__file__).parent / "results"
# In this order: the late answers want a stack that few others ask.
GROUPS: Mapping[str, tuple[Stage, ...]] = {
    "quiet": (
        long.LATE,
        long.NO_BACKUP,
        long.BATCH,
        long.MEMORY,
        long.DISK,
        CERTIFICATE,
        GPU,
    ),
    "traffic": (ENGINE, SIGN_INS, EXPORTER, long.QUEUE, BACKUP),
    "room": (long.NO_ROOM,),
    "log": (long.LOG_FULL,),
    "no-log": (long.NO_LOG,),
    "accounts": (long.PARTITIONS, long.DRIFT, long.WRITES, long.CONNECTIONS),
    # Its process must have done the task before, to tell that it is late.
    "upkeep": (long.UPKEEP,),
    "outage": (long.OUTAGE,),
    "away": (DOOR, METRICS),
}
# Alerts that are not staged, and why.
NOT_STAGED = {
    "CompAIBodiesNotRedacted": "the redactor has no known input that makes it fail; promtool only",
    "CompAIRecordsSetAside": "a rule of Loki, which is no package of Debian",
    "CompAISpoolUnreadable": "a rule of Loki, which is no package of Debian",
}
_FIRE_S = 300.0
_RESOLVE_S = 150.0
_ANSWERED_S = 30.0


@contextmanager
def watched_stack(folder: Path, factor: float) -> Iterator[Scene]:
    """Run the stack and what watches it; everything is gone at the end."""
    with ExitStack() as ending:
        home = Path(tempfile.mkdtemp(prefix="cai-"))
        ending.callback(shutil.rmtree, home, ignore_errors=True)
        if not mount_small_disk(home / "disk", long.SPOOL_DISK_BYTES):
            raise SystemExit("wants root, to make the spool a small disk of its own")
        ending.callback(unmount, home / "disk")
        config = home / "serve.yaml"
        spool = home / "disk" / "spool"
        config.write_text(yaml.safe_dump(long.watched_config(spool), sort_keys=False))
        stack = start_stack(home, config, **stack_settings())
        ending.callback(stack.stop)
        wait_started(stack)
        watch = ending.enter_context(watched(stack, folder, factor))
        wait_healthy(watch)
        yield Scene(stack, watch)


def play_groups(scene: Scene, groups: Sequence[str]) -> Play:
    """Stage the groups, one after another."""
    play = Play(scene)
    for name in groups:
        play.run(GROUPS[name], fire_s=_FIRE_S, resolve_s=_RESOLVE_S)
        for stage in GROUPS[name]:
            for alert in stage.alerts:
                print(f"{name}: {play.seen[alert]}", flush=True)
        long.gone_from_ready(scene.stack)
        wait_healthy(scene.watch)
    return play


def unanswered(scene: Scene) -> list[str]:
    """Return the queries of the dashboards without data, with the reason where there is one."""
    with all_sorts(scene.stack):
        left = without_data(questions(), scene.watch, _ANSWERED_S)
    return [
        f"{one.dashboard}, {one.panel}: `{one.query}` ({one.excuse or 'WRONG'})" for one in left
    ]


def alerts() -> list[str]:
    """Return the names of all alerts of the project."""
    files = [*(MONITORING / "prometheus" / "rules").glob("*.yml")]
    files += (MONITORING / "loki" / "rules").glob("*/*.yml")
    return sorted(
        rule["alert"]
        for file in files
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
        if "alert" in rule
    )


def report(found: Mapping[str, Mapping[str, object]], asked: int, silent: Sequence[str]) -> str:
    """Return the table in Markdown; `asked` is the number of queries that were asked."""
    head = (
        f"{platform.machine()}, 2 cores, 24 GiB, no GPU, other work beside it. Prometheus, "
        "Alertmanager and exporters of Debian, the project's configuration, a scrape every 2 s. "
        "The time of the rules was divided by the factor. Pages stand in for the exporter of the "
        "GPU and for the counters of nginx, which the embedded one is built without."
    )
    lines = ["| alert | staged by | factor | fired after, s | stopped after mending, s |"]
    lines.append("| --- | --- | --- | --- | --- |")
    lines += [_row(name, found.get(name)) for name in alerts()]
    said = f"{asked - len(silent)} of {asked} queries of the dashboards that were asked had data."
    return "\n".join([head, "", *lines, "", said, *(f"- {line}" for line in silent), ""])


def _row(name: str, seen: Mapping[str, object] | None) -> str:
    if seen is None:
        return f"| {name} | not staged: {NOT_STAGED.get(name, 'not run yet')} | | | |"
    fired = seen["fired_after_s"] or "did not fire"
    stopped = seen["resolved_after_s"] or "its window outlasts the run"
    return f"| {name} | {seen['how']} | {seen['factor']:g} | {fired} | {stopped} |"


def write(play: Play, asked: int, silent: Sequence[str], folder: Path, factor: float) -> None:
    """Write the results, beside what runs of other groups found."""
    file = folder / "watch.json"
    before = json.loads(file.read_text()) if file.exists() else {"alerts": {}, "asked": 0}
    found = before["alerts"]
    found |= {name: asdict(seen) | {"factor": factor} for name, seen in play.seen.items()}
    if before["asked"] == asked:
        silent = [line for line in silent if line in before["unanswered"]]
    said = {"alerts": found, "asked": asked, "unanswered": [*silent]}
    file.write_text(json.dumps(said, indent=2) + "\n")
    (folder / "watch.md").write_text(report(found, asked, silent))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=[*GROUPS], default=[*GROUPS])
    parser.add_argument("--factor", type=float, default=FACTOR)
    parser.add_argument("--out", type=Path, help=f"folder for results, as {RESULTS}")
    return parser.parse_args(arguments)


def main() -> int:
    """Run it; return the exit code."""
    arguments = parse()
    if missing := missing_programs():
        raise SystemExit(f"not installed, of Debian: {', '.join(missing)}")
    with (
        tempfile.TemporaryDirectory(prefix="comp-ai-watch-") as folder,
        watched_stack(Path(folder), arguments.factor) as scene,
    ):
        play = play_groups(scene, arguments.groups)
        silent = unanswered(scene)
    if arguments.out is not None:
        write(play, len([*questions()]), silent, arguments.out, arguments.factor)
    for line in [*(f"did not fire: {name}" for name in play.unseen), *silent]:
        print(line, file=sys.stderr)
    return 1 if play.unseen or any("WRONG" in line for line in silent) else 0


if __name__ == "__main__":
    sys.exit(main())
