"""The judge of the chaos suite: what it must find wrong."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from serve_app.fake_engine import FakeEngine, FakeEngineConfig
from serve_app.fake_journal import Counted, CountJournal, read_journals
from tests.chaos.load import Seen
from tests.chaos.reconcile import compare, forget_counts
from tests.chaos.storm import Storm

ROW = uuid.UUID(int=1)
COUNTED = {ROW.hex: Counted(tokens=5, last_s=10.0)}


def _row(request_id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"id": ROW, "request_id": request_id, "outcome": "completed", "tokens": 5, **fields}


def _storm(**seen: Any) -> Storm:
    return Storm(seen=Seen(**seen))


def test_completed_answer_with_its_row_is_well() -> None:
    account = compare(_storm(completed={"a": 5}), [_row()], COUNTED, given_up=set())
    assert (account.wrong, account.cut_tokens, account.unrecorded) == ([], 0, 0)
    assert "0 lost, 0 doubled" in str(account)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "lost: a"),
        ([_row(), _row()], "doubled: a"),
        ([_row(outcome="failed")], "failed 5, seen 5"),
        ([_row(tokens=4)], "completed 4, seen 5"),
        ([_row(tokens=6)], "engines counted 5"),
    ],
)
def test_what_is_wrong_is_named(rows: list[dict[str, Any]], words: str) -> None:
    account = compare(_storm(completed={"a": 5}), rows, COUNTED, given_up=set())
    assert words in "; ".join(account.wrong)


def test_request_without_row_needs_a_killed_gateway_or_its_word() -> None:
    storm = _storm(failed={"a": "RemoteProtocolError"})
    account = compare(storm, [], COUNTED, given_up=set())
    assert [ROW.hex in line for line in account.wrong] == [True]
    told = compare(storm, [], COUNTED, given_up={ROW.hex})
    assert (told.wrong, told.given_up, told.given_up_tokens) == ([], 1, 5)
    storm.gateway_kills_s = [11.0]
    killed = compare(storm, [], COUNTED, given_up=set())
    assert (killed.wrong, killed.unrecorded, killed.unrecorded_tokens) == ([], 1, 5)


@pytest.mark.parametrize(
    ("kill_s", "explained"),
    [
        (7.0, False),  # the engine was at work long after it
        (11.0, True),
        (44.0, True),  # its client is gone, and the gateway may still be recording it
        (46.0, False),
    ],
)
def test_killed_gateway_explains_what_it_may_have_had_under_way(
    kill_s: float, explained: bool
) -> None:
    storm = _storm(failed={"a": "ReadError"})
    storm.gateway_kills_s = [kill_s]
    assert (compare(storm, [], COUNTED, given_up=set()).wrong == []) == explained


def test_tokens_beyond_the_row_are_those_of_attempts_that_were_cut() -> None:
    row = _row(outcome="cancelled", tokens=3)
    account = compare(_storm(left={"a"}), [row], COUNTED, given_up=set())
    assert (account.wrong, account.cut_tokens) == ([], 2)


async def test_engine_notes_each_token_before_it_goes_out(tmp_path: Path) -> None:
    engine = FakeEngine(FakeEngineConfig(time_to_first_token_s=0, journal=tmp_path))
    words = engine._words("one", 3, 10, {})
    await anext(words)
    await anext(words)
    assert _tokens(tmp_path) == {"one": 5}
    await words.aclose()  # type: ignore[attr-defined]
    CountJournal(tmp_path).count("one", 1, 0)
    assert _tokens(tmp_path) == {"one": 6}
    forget_counts(tmp_path)
    assert read_journals(tmp_path) == {}


def _tokens(folder: Path) -> dict[str, int]:
    return {key: count.tokens for key, count in read_journals(folder).items()}
