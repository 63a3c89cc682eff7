"""What is sealed opens with the right key, at the right place, unchanged; and not otherwise."""

from __future__ import annotations

import base64
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.accounts.sealing.aead import SealBroken, Sealer
from serve_app.accounts.sealing.master_keys import (
    MasterKeyMissing,
    MasterKeys,
    NoMasterKey,
    new_master_key,
)
from serve_app.accounts.spooled import SpooledForm
from serve_app.errors import ConfigError, LogUnavailable
from serve_app.records import Outcome, RequestRecord, new_id, utc_now
from serve_app.settings import load_settings
from tests.sealing import FORM, MASTERS

KEY = bytes(range(32))


@given(plain=st.binary(max_size=2000), place=st.binary(max_size=50))
def test_what_is_sealed_opens_in_another_process(plain: bytes, place: bytes) -> None:
    sealed = Sealer(KEY).seal(plain, place)
    assert Sealer(KEY).open(sealed, place) == plain


def test_the_same_text_never_looks_the_same() -> None:
    sealers = [Sealer(KEY), Sealer(KEY)]
    assert len({sealer.seal(b"text", b"here") for sealer in sealers for _ in range(100)}) == 200


def test_every_changed_bit_is_noticed() -> None:
    sealed = Sealer(KEY).seal(b"text", b"here")
    for place in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(SealBroken):
            Sealer(KEY).open(bytes(changed), b"here")


@pytest.mark.parametrize("length", [0, 1, 28, 29, 44])
def test_a_text_that_was_cut_does_not_open(length: int) -> None:
    sealed = Sealer(KEY).seal(b"text", b"here")
    with pytest.raises(SealBroken):
        Sealer(KEY).open(sealed[:length], b"here")


def test_another_key_or_place_does_not_open_it() -> None:
    sealed = Sealer(KEY).seal(b"text", b"here")
    with pytest.raises(SealBroken):
        Sealer(KEY[::-1]).open(sealed, b"here")
    with pytest.raises(SealBroken):
        Sealer(KEY).open(sealed, b"there")


def test_what_a_master_key_gives_is_fixed() -> None:
    # Data that is kept depends on these: they must not change with a release.
    masters = MasterKeys([KEY])
    assert masters.current_id == "0e6489d2e7272861"
    assert (
        masters.derive("spool").hex()
        == "7236d3521fd8b124e456d8d121a07d75e9e55673f2d9ae7fcad61f9694d078ce"
    )


def test_a_text_of_the_first_release_opens() -> None:
    sealed = bytes.fromhex(
        "01000102030405060708090a0b0c0d0e0f00000000000000000000000081d18a"
        "cd078fe4296a8d33a1ef54fb6c524cfbcc"
    )
    assert Sealer(KEY).open(sealed, b"here") == b"text"


def test_the_first_master_key_wraps_and_the_others_open() -> None:
    old, new = new_master_key(), new_master_key()
    before = MasterKeys.parse(old)
    after = MasterKeys.parse(f"{new}\n{old}")
    name, wrapped = before.wrap(KEY, b"here")
    assert after.current_id != name
    assert after.ids[1] == name
    assert after.unwrap(name, wrapped, b"here") == KEY
    name, wrapped = after.wrap(KEY, b"here")
    assert MasterKeys.parse(new).unwrap(name, wrapped, b"here") == KEY
    with pytest.raises(MasterKeyMissing, match=name):
        before.unwrap(name, wrapped, b"here")


@pytest.mark.parametrize("separator", ["\n", ",", ", ", "\r\n", "\n\n"])
def test_master_keys_are_separated_by_lines_or_commas(separator: str) -> None:
    text = separator.join(new_master_key() for _ in range(3))
    assert len(MasterKeys.parse(f"\n{text}\n").ids) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        "c2VjcmV0",
        base64.b64encode(bytes(31)).decode(),
        base64.b64encode(KEY).decode() + ",secret",
    ],
)
def test_what_is_no_master_key_stops_the_start_and_is_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="COMP_AI_MASTER_KEY") as caught:
        MasterKeys.parse(text)
    assert "secret" not in str(caught.value)


def test_a_master_key_twice_is_refused() -> None:
    key = new_master_key()
    with pytest.raises(ConfigError, match="each key once"):
        MasterKeys.parse(f"{key},{key}")


def test_settings_name_the_master_keys() -> None:
    key = new_master_key()
    settings = load_settings({"COMP_AI_MASTER_KEY": key})
    assert MasterKeys.of(settings.sealing).ids == MasterKeys.parse(key).ids
    assert key not in repr(settings)


def test_without_a_master_key_nothing_is_sealed() -> None:
    none = MasterKeys.of(load_settings({}).sealing)
    assert not none
    with pytest.raises(NoMasterKey):
        none.wrap(KEY, b"here")
    with pytest.raises(ConfigError, match="COMP_AI_MASTER_KEY is None; allowed: one, as"):
        none.require("one, as texts are kept")
    MASTERS.require("one, as texts are kept")


# In the spool.


def record(**texts: str) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        request_id="r",
        created_at=utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_id="ann",
        **texts,
    )


@pytest.mark.parametrize(
    "texts",
    [{}, {"request_body": "ask"}, {"request_body": "", "response_text": "a\x00é"}],
)
def test_a_spooled_record_is_read_again(texts: dict[str, str]) -> None:
    one = record(**texts)
    assert SpooledForm(MASTERS).read(FORM.write(one)) == one


def test_a_spooled_record_shows_no_text() -> None:
    data = FORM.write(record(request_body="PROMPT", response_text="ANSWER"))
    assert b"PROMPT" not in data
    assert b"ANSWER" not in data
    assert b"ann" in data


def test_a_record_of_the_time_before_is_read() -> None:
    one = record(request_body="ask", response_text="answer")
    assert FORM.read(one.to_json()) == one


def test_sealed_texts_do_not_open_in_another_record() -> None:
    one = record(request_body="ask")
    data = FORM.write(one).replace(str(one.id).encode(), str(uuid.uuid4()).encode())
    with pytest.raises(SealBroken):
        FORM.read(data)


def test_without_a_master_key_no_text_comes_to_disk() -> None:
    bare = SpooledForm(MasterKeys([]))
    assert bare.read(bare.write(one := record())) == one
    with pytest.raises(LogUnavailable):
        bare.write(record(request_body="ask"))


def test_lone_surrogates_do_not_lose_the_record() -> None:
    assert FORM.read(FORM.write(record(request_body="a\ud800"))).request_body == "a?"
