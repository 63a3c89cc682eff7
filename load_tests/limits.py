"""What the limits cost a request: to reserve and to settle, with the journal on this disk.

    python -m load_tests.limits [--folder FOLDER]

Prints a table. The calls to the Limits replica through Ray come on top; see `limits` in the
`Server-Timing` of an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import pickle
import statistics
import tempfile
import time
import uuid
from pathlib import Path

from serve_app.config import LimitsConfig
from serve_app.contracts import Reservation, Settlement, Spent
from serve_app.errors import LimitsUnavailable
from serve_app.identity.principal import Permission, Principal
from serve_app.lazy_pool import build_pool
from serve_app.limits.book import LimitBook
from serve_app.limits.journal import Journal
from serve_app.limits.keeping import LimitKeeping, NoLimitMetrics
from serve_app.limits.scopes import scopes_of
from serve_app.limits.usage_store import UsageStore
from serve_app.records import PrincipalKind
from serve_app.settings import PostgresSettings

REQUESTS = 20_000
CALLERS = (1, 16, 256)
_POLICY = {
    "requests_per_minute": 1_000_000,
    "tokens_per_minute": 10**12,
    "concurrency": 100_000,
    "tokens_per_month": 10**12,
}
# Five scopes: everyone, the principal, its key, a group and a role.
LIMITS = LimitsConfig.model_validate(
    {
        "everyone": _POLICY,
        "default": _POLICY,
        "groups": {"lab": {"members": "together", **_POLICY}},
        "roles": {"trial": {"members": "each", **_POLICY}},
    }
)


def reservation(number: int) -> Reservation:
    """Return what a request of one of a hundred principals reserves."""
    principal = Principal(
        id=f"user-{number % 100}",
        kind=PrincipalKind.USER,
        permissions=frozenset({Permission.USER}),
        api_key_id=uuid.UUID(int=number % 100),
        groups=frozenset({"lab"}),
        roles=frozenset({"trial"}),
    )
    scopes = scopes_of(principal, LIMITS)
    return Reservation(id=uuid.uuid4(), scopes=scopes, most=Spent(tokens=900, cost_micros=12))


def settlement(of: Reservation) -> Settlement:
    """Return what it did use."""
    accounts = tuple(scope.key for scope in of.scopes)
    return Settlement(id=of.id, accounts=accounts, spent=Spent(tokens=300, cost_micros=4))


def time_book() -> float:
    """Return the CPU seconds that one reserve and its settle take in the book alone."""
    book = LimitBook(time.monotonic, time.time)
    asked = [reservation(number) for number in range(REQUESTS)]
    settled = [settlement(one) for one in asked]
    begun_s = time.process_time()
    for one, end in zip(asked, settled, strict=True):
        book.reserve(one)
        book.settle(end)
    return (time.process_time() - begun_s) / REQUESTS


async def time_journal(folder: Path, callers: int) -> tuple[float, float, list[float]]:
    """Return the requests a second of `callers` at once, the CPU seconds of one, and how long
    each reserve took."""
    nowhere = PostgresSettings.model_validate({"POSTGRES_HOST": "/nowhere"})
    # Known before, so that budgets are granted without PostgreSQL.
    journal = Journal(folder)
    await journal.open()
    await journal.identify()
    await journal.close()
    pool = build_pool(nowhere, application_name="limits", max_size=1, unavailable=LimitsUnavailable)
    limits = LimitKeeping(Journal(folder), UsageStore(pool), NoLimitMetrics())
    await limits.start()
    took_s: list[float] = []

    async def ask(share: int) -> None:
        for number in range(share):
            one = reservation(number)
            begun_s = time.perf_counter()
            await limits.reserve(one)
            took_s.append(time.perf_counter() - begun_s)
            await limits.settle(settlement(one))

    share = max(1, min(REQUESTS, callers * 2000) // callers)
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(ask(share) for _ in range(callers)))
    rate = len(took_s) / (time.perf_counter() - begun_s)
    cpu_s = (time.process_time() - begun_cpu_s) / len(took_s)
    await limits.close()
    return rate, cpu_s, took_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the journal lies; a new one if not set")
    given: Path | None = parser.parse_args().folder
    one = reservation(1)
    print(f"reserve message: {len(pickle.dumps(one))} bytes, five scopes with four limits each")
    print(f"settle message: {len(pickle.dumps(settlement(one)))} bytes")
    print(f"book alone: {time_book() * 1e6:.0f} us of CPU a request (reserve and settle)")
    print("| callers | requests/s | CPU, us a request | reserve p50, ms | reserve p99, ms |")
    print("| --- | --- | --- | --- | --- |")
    for callers in CALLERS:
        with tempfile.TemporaryDirectory(dir=given) as folder:
            rate, cpu_s, took_s = asyncio.run(time_journal(Path(folder), callers))
        p50, p99 = statistics.median(took_s), statistics.quantiles(took_s, n=100)[-1]
        cells = f"{rate:.0f} | {cpu_s * 1e6:.0f} | {p50 * 1e3:.2f} | {p99 * 1e3:.2f}"
        print(f"| {callers} | {cells} |")


if __name__ == "__main__":
    main()
