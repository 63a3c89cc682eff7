"""The door of a replica: in only with the token of a live lease, one at a time."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from serve_app.replica import (
    ABORT_PATH,
    END_PATH,
    LEASE_HEADER,
    REQUEST_ID_HEADER,
    LeaseBook,
    LeaseDoor,
    Run,
    Slot,
    may_keep,
)
from serve_app.scaling.readings import FirstTokens

PATH = "/v1/completions"


class App:
    """An engine's app that waits until it is let go, and notes how it ended."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.ended: list[str] = []
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200."""
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        if self.error is not None:
            raise self.error
        self.ended.append("answered")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Door:
    """A door with an app behind it, and a way to knock."""

    def __init__(self) -> None:
        self.app = App()
        self.book = LeaseBook()
        self.aborted: list[Run] = []
        self.first_tokens = FirstTokens()
        self._door = LeaseDoor(self.app, self.book, self._abort, self.first_tokens)

    async def _abort(self, run: Run) -> None:
        self.aborted.append(run)

    async def knock(self, token: str | None, path: str = PATH, **headers: str) -> tuple[int, bytes]:
        """Send one request and return status and body; 0 where no answer came."""
        sent: list[tuple[int, bytes]] = []
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            named[LEASE_HEADER] = token
        raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]

        async def send(message: dict[str, object]) -> None:
            sent.append((int(str(message.get("status", 0))), bytes(message.get("body", b""))))  # type: ignore[call-overload]

        async def receive() -> dict[str, object]:
            await asyncio.Event().wait()
            raise AssertionError

        scope = {"type": "http", "path": path, "headers": raw}
        await self._door(scope, receive, send)  # type: ignore[arg-type]
        return sum(status for status, _ in sent), b"".join(body for _, body in sent)


@pytest.fixture
async def door() -> Door:
    return Door()


@pytest.mark.parametrize("token", [None, "", "guessed", "\xff"])
@pytest.mark.parametrize("path", [PATH, ABORT_PATH, END_PATH, "/metrics"])
async def test_without_a_live_lease_nobody_gets_in(
    door: Door, token: str | None, path: str
) -> None:
    async with door.book.lease():
        status, body = await door.knock(token, path)
    assert status == 403
    assert orjson.loads(body)["error"]["message"] == "no live lease"
    assert not door.app.entered.is_set()
    assert not door.aborted


async def test_token_opens_once(door: Door) -> None:
    door.app.go.set()
    async with door.book.lease() as slot:
        assert (await door.knock(slot.token))[0] == 200
        assert (await door.knock(slot.token))[0] == 409
    assert door.app.ended == ["answered"]


async def test_token_opens_once_also_while_the_first_request_runs(door: Door) -> None:
    async with door.book.lease() as slot:
        first = asyncio.create_task(door.knock(slot.token))
        await door.app.entered.wait()
        assert (await door.knock(slot.token))[0] == 409
        door.app.go.set()
        assert (await first)[0] == 200


async def test_token_of_an_ended_lease_is_worthless(door: Door) -> None:
    async with door.book.lease() as slot:
        assert len(door.book) == 1
    assert len(door.book) == 0
    assert (await door.knock(slot.token))[0] == 403


async def test_leases_have_tokens_of_their_own(door: Door) -> None:
    async with door.book.lease() as one, door.book.lease() as two:
        assert one.token != two.token
        assert min(len(one.token), len(two.token)) >= 32
        assert door.book.find(one.token) is one


async def test_lease_is_ended_at_its_door(door: Door) -> None:
    async with door.book.lease(kept=True) as slot:
        assert (await door.knock(slot.token, END_PATH))[0] == 202
        assert slot.stopped.is_set()
        assert (await door.knock(slot.token))[0] == 409
    assert not door.app.entered.is_set()


async def test_what_runs_under_a_lease_ends_with_it_at_its_door(door: Door) -> None:
    async with door.book.lease() as slot:
        serving = asyncio.create_task(door.knock(slot.token))
        await door.app.entered.wait()
        assert (await door.knock(slot.token, END_PATH))[0] == 202
        async with asyncio.timeout(10):
            await serving
    assert door.app.ended == ["cancelled"]


async def test_abort_names_what_runs_under_the_lease(door: Door) -> None:
    async with door.book.lease() as slot:
        headers = {REQUEST_ID_HEADER: "r1"}
        serving = asyncio.create_task(door.knock(slot.token, **headers))
        await door.app.entered.wait()
        assert (await door.knock(slot.token, ABORT_PATH))[0] == 202
        (aborted,) = door.aborted
        assert aborted.request_id == "r1"
        door.app.go.set()
        assert (await serving)[0] == 200  # an abort ends in good order


async def test_end_of_the_lease_stops_what_runs_under_it(door: Door) -> None:
    async with door.book.lease() as slot:
        serving = asyncio.create_task(door.knock(slot.token))
        await door.app.entered.wait()
    async with asyncio.timeout(10):
        assert (await serving)[0] == 0
    assert door.app.ended == ["cancelled"]


async def test_cancelled_lease_stops_what_runs_under_it(door: Door) -> None:
    granted: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with door.book.lease() as slot:
            granted.set_result(slot)
            await asyncio.Event().wait()

    lease = asyncio.create_task(hold())
    serving = asyncio.create_task(door.knock((await granted).token))
    await door.app.entered.wait()
    lease.cancel()
    async with asyncio.timeout(10):
        await serving
    assert door.app.ended == ["cancelled"]
    assert len(door.book) == 0


async def test_app_that_looks_learns_that_its_client_is_gone(door: Door) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        door.app.entered.set()
        seen.append((await receive())["type"])

    door._door = LeaseDoor(app, door.book, door._abort, door.first_tokens)
    async with door.book.lease() as slot:
        serving = asyncio.create_task(door.knock(slot.token))
        await door.app.entered.wait()
    async with asyncio.timeout(10):
        await serving
    assert seen == ["http.disconnect"]


async def test_error_of_the_app_reaches_the_server(door: Door) -> None:
    door.app.error = RuntimeError("engine")
    door.app.go.set()
    async with door.book.lease() as slot:
        with pytest.raises(RuntimeError, match="engine"):
            await door.knock(slot.token)


async def test_only_http_is_served(door: Door) -> None:
    async with door.book.lease() as slot:
        headers = [(LEASE_HEADER.encode(), slot.token.encode())]
        await door._door({"type": "websocket", "path": PATH, "headers": headers}, None, None)  # type: ignore[arg-type]
    assert not door.app.entered.is_set()


async def test_first_part_of_a_stream_is_timed_and_a_whole_answer_only_counted(door: Door) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"w", "more_body": more})

    noted: list[float | None] = []
    door.first_tokens.note = noted.append  # type: ignore[method-assign]
    door.app.go.set()
    async with door.book.lease() as slot:
        await door.knock(slot.token)
    door._door = LeaseDoor(app, door.book, door._abort, door.first_tokens)
    async with door.book.lease() as slot:
        assert await door.knock(slot.token) == (200, b"www")
    assert noted[0] is None
    assert [after_s is not None and after_s >= 0 for after_s in noted[1:]] == [True]


async def test_kept_lease_lets_one_in_after_the_other(door: Door) -> None:
    async with door.book.lease(kept=True) as slot:
        assert door.book.resting == 0  # the first is on its way
        first = asyncio.create_task(door.knock(slot.token))
        await door.app.entered.wait()
        assert (await door.knock(slot.token))[0] == 409
        assert door.book.resting == 0
        door.app.go.set()
        assert (await first)[0] == 200
        assert door.book.resting == 1
        assert (await door.knock(slot.token))[0] == 200
    assert door.app.ended == ["answered", "answered"]
    assert (await door.knock(slot.token))[0] == 403


async def test_kept_lease_whose_request_failed_lets_nobody_in(door: Door) -> None:
    door.app.error = RuntimeError("engine")
    door.app.go.set()
    async with door.book.lease(kept=True) as slot:
        with pytest.raises(RuntimeError, match="engine"):
            await door.knock(slot.token)
        assert (await door.knock(slot.token))[0] == 409
        assert door.book.resting == 0


async def test_kept_lease_whose_request_was_not_answered_lets_nobody_in(door: Door) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"w", "more_body": True})

    door._door = LeaseDoor(app, door.book, door._abort, door.first_tokens)
    async with door.book.lease(kept=True) as slot:
        assert (await door.knock(slot.token))[0] == 200
        assert (await door.knock(slot.token))[0] == 409


class Tidying:
    """An app that has something left to do after its last byte; how each run ended."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()
        self.runs = 0
        self.cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and stay."""
        self.runs += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        self.answered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def test_next_request_does_not_wait_for_what_follows_the_last_byte(door: Door) -> None:
    app = Tidying()
    door._door = LeaseDoor(app, door.book, door._abort, door.first_tokens)
    async with door.book.lease(kept=True) as slot:
        first = asyncio.create_task(door.knock(slot.token))
        await app.answered.wait()
        second = asyncio.create_task(door.knock(slot.token))
        async with asyncio.timeout(10):
            while app.runs < 2:  # noqa: ASYNC110 - of the app
                await asyncio.sleep(0)
    # The end of the lease ends both.
    async with asyncio.timeout(10):
        await asyncio.wait([first, second])
    assert app.cancelled == 2


async def test_late_abort_does_not_end_the_next_request(door: Door) -> None:
    async with door.book.lease(kept=True) as slot:
        door.app.go.set()
        await door.knock(slot.token, **{REQUEST_ID_HEADER: "r1"})
        door.app.go.clear()
        door.app.entered.clear()
        next_one = asyncio.create_task(door.knock(slot.token, **{REQUEST_ID_HEADER: "r2"}))
        await door.app.entered.wait()
        assert (await door.knock(slot.token, ABORT_PATH, **{REQUEST_ID_HEADER: "r1"}))[0] == 202
        assert door.aborted == []
        assert (await door.knock(slot.token, ABORT_PATH, **{REQUEST_ID_HEADER: "r2"}))[0] == 202
        assert [run.request_id for run in door.aborted] == ["r2"]
        door.app.go.set()
        assert (await next_one)[0] == 200


async def test_abort_of_what_has_not_come_or_has_ended_finds_nothing(door: Door) -> None:
    door.app.go.set()
    async with door.book.lease(kept=True) as slot:
        assert (await door.knock(slot.token, ABORT_PATH, **{REQUEST_ID_HEADER: "r1"}))[0] == 202
        await door.knock(slot.token, **{REQUEST_ID_HEADER: "r1"})
        assert (await door.knock(slot.token, ABORT_PATH))[0] == 202
    assert door.aborted == []


async def test_cancelled_handler_stops_its_request_and_spends_the_lease(door: Door) -> None:
    async with door.book.lease(kept=True) as slot:
        serving = asyncio.create_task(door.knock(slot.token))
        await door.app.entered.wait()
        serving.cancel()
        await asyncio.wait([serving])
        assert (await door.knock(slot.token))[0] == 409
        async with asyncio.timeout(10):
            while not door.app.ended:  # noqa: ASYNC110 - of the app
                await asyncio.sleep(0.01)
    assert door.app.ended == ["cancelled"]


@pytest.mark.parametrize(("slots", "kept"), [(0, 0), (1, 0), (15, 0), (16, 1), (512, 32)])
def test_few_slots_are_left_to_whoever_asks(slots: int, kept: int) -> None:
    assert may_keep(slots) == kept
