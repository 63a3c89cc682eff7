"""Which backups are kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from serve_app.backup.errors import BackupDamaged
from serve_app.backup.manifest import Manifest, name_at
from serve_app.backup.scheme import KeepScheme

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)  # a Saturday


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("scheme", "taken", "kept"),
    [
        # The newest of each day; days without one do not count.
        (
            KeepScheme(daily=2, weekly=0, monthly=0),
            ["2026-11-20T01:00", "2026-11-20T23:00", "2026-11-22T01:00", "2026-11-25T01:00"],
            ["2026-11-22T01:00", "2026-11-25T01:00"],
        ),
        # A week begins on Monday.
        (
            KeepScheme(daily=0, weekly=2, monthly=0),
            ["2026-11-15T01:00", "2026-11-16T01:00", "2026-11-22T01:00", "2026-11-23T01:00"],
            ["2026-11-22T01:00", "2026-11-23T01:00"],
        ),
        # The days around a new year are of one week.
        (
            KeepScheme(daily=0, weekly=1, monthly=0),
            ["2025-12-29T01:00", "2026-01-02T01:00"],
            ["2026-01-02T01:00"],
        ),
        (
            KeepScheme(daily=0, weekly=0, monthly=2),
            ["2025-11-30T01:00", "2026-10-01T01:00", "2026-10-31T01:00", "2026-11-01T01:00"],
            ["2026-10-31T01:00", "2026-11-01T01:00"],
        ),
        # Whatever is younger than a day, and the newest, however old and whatever the scheme.
        (
            KeepScheme(daily=0, weekly=0, monthly=0),
            ["2026-11-27T11:00", "2026-11-27T13:00", "2026-11-28T11:00"],
            ["2026-11-27T13:00", "2026-11-28T11:00"],
        ),
        (KeepScheme(daily=0, weekly=0, monthly=0), ["2020-01-01T01:00"], ["2020-01-01T01:00"]),
        (KeepScheme(), [], []),
    ],
)
def test_what_the_scheme_keeps(scheme: KeepScheme, taken: list[str], kept: list[str]) -> None:
    assert scheme.kept(map(at, taken), NOW) == set(map(at, kept))


def test_a_year_of_daily_backups_leaves_as_many_as_the_scheme_says() -> None:
    scheme = KeepScheme(daily=7, weekly=4, monthly=12)
    taken: set[datetime] = set()
    for day in range(800):
        now = NOW + timedelta(days=day)
        taken = scheme.kept(taken | {now}, now)
    ages = sorted((NOW + timedelta(days=799) - one).days for one in taken)
    assert ages[:7] == list(range(7))
    # Some backup is in more than one of the three.
    assert 7 + 4 + 12 - 5 <= len(taken) <= 7 + 4 + 12
    assert 304 <= ages[-1] <= 366


def test_a_name_says_when() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 67_999, tzinfo=UTC)
    assert name_at(moment) == "comp-ai-20260102T030405.067Z"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": 2}'])
def test_what_is_no_manifest_is_refused_without_quoting_it(data: bytes) -> None:
    with pytest.raises(BackupDamaged, match="comp-ai-x is damaged"):
        Manifest.from_json(data, "comp-ai-x")
