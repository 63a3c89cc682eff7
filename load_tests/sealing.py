"""What sealing and redaction cost a record, in CPU time, without PostgreSQL and without a disk.

    python -m load_tests.sealing

Each figure is the median of rounds, in which the steps take turns. CPU time of one thread, so a
busy machine moves it little. Writes `load_tests/results/sealing.{json,md}`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import psutil

from serve_app.accounts.bodies import text_of
from serve_app.accounts.redaction import Redactor
from serve_app.accounts.sealing.aead import Sealer
from serve_app.accounts.sealing.master_keys import MasterKeys, new_master_key
from serve_app.accounts.spooled import SpooledForm
from serve_app.records import Outcome, RequestRecord, new_id, utc_now

RESULTS = Path(__file__).parent / "results"
_ROUNDS = 15
_PROSE = "The order of 12 May came to 37 crates; ask Ada (ada@example.org) about the other 140. "


def _record(text_chars: int) -> RequestRecord:
    text = (_PROSE * (text_chars // len(_PROSE) + 1))[:text_chars]
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 256}
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id="ann",
        request_body=orjson.dumps(body).decode(),
        response_text=text,
    )


def _cpu_us(step: Callable[[], object], times: int) -> float:
    begun = time.thread_time()
    for _ in range(times):
        step()
    return (time.thread_time() - begun) / times * 1e6


def measure(text_chars: int) -> dict[str, float]:
    """Return CPU µs a record, by step; prompt and answer have `text_chars` characters each."""
    record, key = _record(text_chars), os.urandom(32)
    form = SpooledForm(MasterKeys.parse(new_master_key()))
    sealer, redactor = Sealer(key), Redactor()
    spooled, text = form.write(record), text_of(record)
    sealed = sealer.seal(text.plain, text.place)
    answer = record.response_text or ""
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "write for the spool, sealed": (lambda: form.write(record), 200),
        "read from the spool": (lambda: form.read(spooled), 200),
        "seal for PostgreSQL": (lambda: sealer.seal(text_of(record).plain, text.place), 500),
        "open, key at hand": (lambda: sealer.open(sealed, text.place), 500),
        "open, in another process": (lambda: Sealer(key).open(sealed, text.place), 200),
        "redact both texts": (
            lambda: (redactor.body(record.request_body or ""), redactor.text(answer)),
            5,
        ),
    }
    rounds = [{name: _cpu_us(*step) for name, step in steps.items()} for _ in range(_ROUNDS)]
    return {name: round(statistics.median(one[name] for one in rounds), 1) for name in steps}


def main() -> None:
    """Measure, and write what was seen."""
    found = {chars: measure(chars) for chars in (500, 2000, 20_000)}
    gib = round(psutil.virtual_memory().total / 2**30)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {gib} GiB, no GPU"
    what = f"{machine}, Python {platform.python_version()}; load average {os.getloadavg()[0]:.1f}."
    rows = {name: [found[chars][name] for chars in found] for name in found[500]}
    heads = " | ".join(f"{chars:,} characters" for chars in found)
    table = "\n".join(f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows.items())
    text = (
        f"{what} CPU time in µs a record, whose prompt and answer have so many characters each; "
        f"medians of {_ROUNDS} rounds.\n\n| step | {heads} |\n"
        f"| --- |{' --- |' * len(found)}\n{table}\n"
    )
    RESULTS.joinpath("sealing.md").write_text(text, encoding="utf-8")
    data = {"machine": what, "cpu_us": found}
    RESULTS.joinpath("sealing.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
