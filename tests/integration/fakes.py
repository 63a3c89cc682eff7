"""A whole gateway in one process: the real Gateway, HTTP app, replicas' doors and limits book,
joined by plain objects where Ray stands in production (`serve_app.contracts`).

A `Gate` stands at each seam, so that a test can hold a request at exactly that step.
"""

from __future__ import annotations

import asyncio
import io
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.completions.body import Defaults
from serve_app.completions.gateway import Gateway
from serve_app.completions.parts import Parts, Tracing
from serve_app.completions.upstream import new_session
from serve_app.config import GatewayConfig, ModelEntry
from serve_app.contracts import (
    Allowance,
    Lease,
    LeaseGrant,
    LeaseHint,
    LimitState,
    ModelState,
    Reservation,
    Settlement,
    Spent,
)
from serve_app.contracts import Scope as LimitScope
from serve_app.engine_counters import EngineCounters
from serve_app.errors import (
    AuthenticationFailed,
)
from serve_app.fake_engine import FakeEngine, FakeEngineConfig
from serve_app.http_app import Check, create_app
from serve_app.identity.authenticator import build_authenticator
from serve_app.identity.principal import Authenticator, Permission, Principal
from serve_app.lazy_pool import LazyPool, Pool, build_pool
from serve_app.limits.book import LimitBook
from serve_app.metrics import NoMetrics
from serve_app.queueing.pool import QueuedPool
from serve_app.read_pool import ReadPool, build_read_pool
from serve_app.records import PrincipalKind, RequestRecord
from serve_app.replica import LeaseBook, LeaseDoor, ReplicaServer, Run, Slot
from serve_app.request_line import RequestLines
from serve_app.scaling.readings import FirstTokens
from serve_app.settings import PostgresSettings, load_settings
from serve_app.stored.vault import Vault
from serve_app.tracing.replica import TracedApp
from serve_app.tracing.sampling import Sampling
from serve_app.tracing.spans import SpanSink
from tests.sealing import MASTERS, subject_keys

HOST = "127.0.0.1"
KEY = "key-of-a-user"
AUTHORIZATION = {"authorization": f"Bearer {KEY}"}
_PATIENCE_S = 20.0


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds. Raises TimeoutError if it does not come to that."""
    async with asyncio.timeout(_PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - of whatever state
            await asyncio.sleep(0.002)


class Gate:
    """Lets everybody pass while it is open, and counts who waits while it is shut."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0

    def shut(self) -> None:
        """Hold whoever comes."""
        self._open.clear()

    def open(self) -> None:
        """Let everybody pass."""
        self._open.set()

    async def passed(self) -> None:
        """Wait until the gate is open."""
        self.waiting += 1
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1

    async def reached(self) -> None:
        """Return once somebody waits."""
        await until(lambda: self.waiting > 0)


class FakeReplica:
    """A replica of a model: an engine behind a real door and a real HTTP server."""

    def __init__(
        self,
        replica_id: str,
        speed: FakeEngineConfig,
        app: ASGIApp | None,
        sink: SpanSink | None = None,
    ) -> None:
        self.id = replica_id
        self.engine = FakeEngine(speed)
        self.leases = LeaseBook()
        # Passed by a request that is through the door, before the engine sees it.
        self.gate = Gate()
        self._app = app or self.engine.app()
        if sink is not None:
            self._app = TracedApp(self._app, sink, {"comp_ai.replica_id": replica_id})
        door = LeaseDoor(self._behind_the_gate, self.leases, self._abort, FirstTokens())
        self.server = ReplicaServer(door, HOST)

    async def _behind_the_gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gate.passed()
        await self._app(scope, receive, send)

    async def _abort(self, run: Run) -> None:
        self.engine.abort(run.request_id)

    @property
    def counters(self) -> EngineCounters:
        """What the engine counted."""
        return self.engine.counters(
            replica_id=self.id, live_leases=len(self.leases), resting_leases=self.leases.resting
        )


class FakeLease:
    """A lease that a task holds open."""

    def __init__(self, grant: LeaseGrant, holding: asyncio.Task[None]) -> None:
        self._grant = grant
        self._holding = holding

    @property
    def grant(self) -> LeaseGrant:
        """Where and with what to ask."""
        return self._grant

    def close(self) -> None:
        """End the task."""
        self._holding.cancel()


class FakePool:
    """Opens leases at the replica that holds the fewest, at the first of several.

    Like Ray it does not look at what a hint would rather avoid. `gate` is passed with the slot
    already taken. With a `capacity` no more than so many leases are open at once; who comes then
    waits. `may_keep` is what its grants say.
    """

    def __init__(self, replica: FakeReplica, *more: FakeReplica) -> None:
        self.replicas = [replica, *more]
        self.gate = Gate()
        self.error: Exception | None = None
        self.hints: list[LeaseHint] = []
        self.capacity: int | None = None
        self.may_keep = 0
        self.state_now = ModelState.SERVING
        # Calls that wait for room.
        self.asking = 0
        self._holding: set[asyncio.Task[None]] = set()

    async def open(self, model: ModelEntry, hint: LeaseHint) -> Lease:
        """See `ModelPool.open`."""
        if self.error is not None:
            raise self.error
        self.hints.append(hint)
        await self._room()
        replica = min(self.replicas, key=lambda one: len(one.leases))
        granted: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        holding = asyncio.create_task(self._hold(replica, granted))
        self._holding.add(holding)
        holding.add_done_callback(self._holding.discard)
        try:
            slot = await granted
            await self.gate.passed()
        except BaseException:
            holding.cancel()
            raise
        grant = LeaseGrant(
            address=replica.server.address,
            token=slot.token,
            replica_id=replica.id,
            may_keep=self.may_keep,
        )
        return FakeLease(grant, holding)

    async def _room(self) -> None:
        self.asking += 1
        try:
            while not self._has_room():  # noqa: ASYNC110 - of whatever state
                await asyncio.sleep(0.002)
        finally:
            self.asking -= 1

    def lose_leases(self) -> None:
        """End all leases without a word to who holds them, as when replicas start anew."""
        for holding in self._holding:
            holding.cancel()

    def _has_room(self) -> bool:
        return not self.state_now.cold and (
            self.capacity is None or len(self._holding) < self.capacity
        )

    async def _hold(self, replica: FakeReplica, granted: asyncio.Future[Slot]) -> None:
        async with replica.leases.lease(kept=self.may_keep > 0) as slot:
            granted.set_result(slot)
            await slot.stopped.wait()

    async def state(self, model: ModelEntry) -> ModelState:
        """See `ModelPool.state`."""
        return self.state_now if self.error is None else ModelState.FAILED

    async def close(self) -> None:
        """See `ModelPool.close`."""


class BookKeeper:
    """Keeps limits in a book of its own. `gate` is passed with the reservation already made."""

    def __init__(self) -> None:
        self.book = LimitBook(time.monotonic, time.time)
        self.gate = Gate()
        self.settling = Gate()
        self.error: Exception | None = None
        self.reserved: Counter[uuid.UUID] = Counter()
        self.settled: Counter[uuid.UUID] = Counter()

    async def reserve(self, reservation: Reservation) -> Allowance:
        """See `LimitKeeper.reserve`."""
        if self.error is not None:
            raise self.error
        allowance = self.book.reserve(reservation)
        if allowance.refusal is None:
            self.reserved[reservation.id] += 1
            await self.gate.passed()
        return allowance

    async def settle(self, reservation: Reservation, spent: Spent) -> None:
        """See `LimitKeeper.settle`."""
        self.settled[reservation.id] += 1
        accounts = tuple(scope.key for scope in reservation.scopes)
        self.book.settle(Settlement(id=reservation.id, accounts=accounts, spent=spent))
        await self.settling.passed()

    async def standing(self, scopes: Sequence[LimitScope]) -> list[LimitState]:
        """See `LimitKeeper.standing`."""
        if self.error is not None:
            raise self.error
        return self.book.standing(scopes)

    def held(self, principal_id: str) -> int:
        """Return how many requests of a principal are under way."""
        return self.book.held(f"principal:{principal_id}")


class RecordList:
    """Keeps records in memory, once the gate is open."""

    def __init__(self, events: list[str]) -> None:
        self.records: list[RequestRecord] = []
        self.full = False
        self.gate = Gate()
        self.error: Exception | None = None
        self._events = events

    async def append(self, record: RequestRecord) -> None:
        """See `RecordSink.append`."""
        await self.gate.passed()
        if self.error is not None:
            raise self.error
        self.records.append(record)
        self._events.append("recorded")


class FakeAuthenticator:
    """Knows `KEY`, and the keys that a test adds; or a real one stands `behind` it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.error: Exception | None = None
        self.principals = {KEY: principal("user-1")}
        self.behind: Authenticator | None = None

    async def authenticate(self, authorization: str | None) -> Principal:
        """See `Authenticator.authenticate`."""
        await self.gate.passed()
        if self.error is not None:
            raise self.error
        if self.behind is not None:
            return await self.behind.authenticate(authorization)
        found = self.principals.get((authorization or "").removeprefix("Bearer "))
        if found is None:
            raise AuthenticationFailed
        return found


def principal(principal_id: str, **more: Any) -> Principal:
    """Return a user, with the roles that give the permissions and models in `more`."""
    fields = {"kind": PrincipalKind.USER, "permissions": frozenset({Permission.USER}), **more}
    roles = {str(permission) for permission in fields["permissions"]}
    roles |= {f"comp-ai:model:{model}" for model in fields.get("models") or ()}
    return Principal(id=principal_id, **{**fields, "roles": roles | fields.get("roles", set())})


class Watched:
    """The app as the server sees it: notes what it sends, and can cancel it as Serve does."""

    def __init__(self, app: ASGIApp, events: list[str]) -> None:
        self.inner = app
        self._events = events
        self._handling: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        task = asyncio.current_task()
        assert task is not None
        self._handling.add(task)

        async def noted(message: Message) -> None:
            last = not message.get("more_body", False)
            start = message["type"] == "http.response.start"
            self._events.append("start" if start else "last" if last else "part")
            await send(message)

        try:
            await self.inner(scope, receive, noted)
        finally:
            self._handling.discard(task)

    @property
    def busy(self) -> bool:
        """Whether a request is being handled."""
        return bool(self._handling)

    def cancel(self) -> None:
        """Cancel the handling of every request."""
        for task in self._handling:
            task.cancel()


def no_database() -> LazyPool:
    """Return the pool of a PostgreSQL that is away."""

    async def connect() -> Pool:
        raise ConnectionRefusedError

    return LazyPool(connect)


def _pool(settings: PostgresSettings, name: str = "tests-gateway") -> LazyPool:
    return build_pool(settings, application_name=name, max_size=4)


class World:
    """A gateway with all its parts, serving on a port."""

    def __init__(
        self,
        config: GatewayConfig,
        speed: FakeEngineConfig,
        engine_app: ASGIApp | None,
        database: PostgresSettings | None,
        replicas: int,
        authenticator: FakeAuthenticator | None,
        sink: SpanSink | None,
    ) -> None:
        self.database = no_database() if database is None else _pool(database)
        self.batches = no_database() if database is None else _pool(database, "tests-batches")
        self.reports = ReadPool(self.database)
        if database is not None:
            self.reports = build_read_pool(database, application_name="tests-reports")
        self.events: list[str] = []
        self.replica = FakeReplica("replica-1", speed, engine_app, sink)
        more = [FakeReplica(f"replica-{n}", speed, None, sink) for n in range(2, replicas + 1)]
        self.replicas = [self.replica, *more]
        self.pool = FakePool(self.replica, *more)
        self.limits = BookKeeper()
        self.log = RecordList(self.events)
        self.tracing = None if sink is None else Tracing(sampling=Sampling(1.0), sink=sink)
        self.authenticator = authenticator or FakeAuthenticator()
        self.lines = io.StringIO()
        self.queue = QueuedPool(self.pool, NoMetrics())
        self.gateway = Gateway(config, self._parts())
        checks = [Check("model", lambda: self.queue.ready(config.models[0]))]
        self.app = Watched(create_app(lambda: self.gateway, lambda: checks), self.events)
        self.server = ReplicaServer(self.app, HOST)

    def _parts(self) -> Parts:
        return Parts(
            authenticator=self.authenticator,
            limits=self.limits,
            models=self.queue,
            log=self.log,
            metrics=NoMetrics(),
            lines=RequestLines(self.lines),
            session=new_session(),
            database=self.database,
            reports=self.reports,
            defaults=Defaults(max_tokens=4096, temperature=0.7),
            masters=MASTERS,
            vault=Vault(subject_keys()),
            tracing=self.tracing,
        )

    @property
    def url(self) -> str:
        """Base URL, without a path."""
        return f"http://{self.server.address}"

    @property
    def records(self) -> list[RequestRecord]:
        """What was recorded."""
        return self.log.records

    async def quiet(self, records: int = 1) -> None:
        """Return once nothing runs and nothing is held, and check that it was undone once."""
        await until(lambda: len(self.records) >= records and not self.app.busy)
        for replica in self.replicas:
            await until(lambda it=replica: it.counters.requests_running == 0)  # type: ignore[misc]
            await until(lambda it=replica: it.counters.live_leases == 0)  # type: ignore[misc]
        assert len(self.records) == records
        assert self.limits.held("user-1") == 0
        assert set(self.limits.settled.values()) <= {1}
        assert self.limits.reserved.keys() <= self.limits.settled.keys()
        assert len(self.lines.getvalue().splitlines()) == records

    async def the_record(self) -> RequestRecord:
        """Return the only record, once nothing runs; its tokens are the engine's."""
        await self.quiet()
        (record,) = self.records
        return record

    def assert_accounts_add_up(self) -> None:
        """Check that the records hold the tokens that the engine counted."""
        counted = [replica.counters for replica in self.replicas]
        for name in ("prompt_tokens", "completion_tokens"):
            recorded = sum(getattr(row, name) for row in self.records)
            assert recorded == sum(getattr(counters, name) for counters in counted)


FAST = FakeEngineConfig(time_to_first_token_s=0.0, time_per_token_s=0.0005)


@asynccontextmanager
async def world(
    speed: FakeEngineConfig = FAST,
    engine_app: ASGIApp | None = None,
    database: PostgresSettings | None = None,
    replicas: int = 1,
    authenticator: FakeAuthenticator | None = None,
    sink: SpanSink | None = None,
    **config: Any,
) -> AsyncIterator[World]:
    """Serve a gateway and replicas until the block ends; `config` is the gateway's policy.

    `engine_app` stands in the place of the first replica's engine. Without `database` the
    gateway's PostgreSQL is away. With a `sink` every request is traced.
    """
    models = [{"name": "small", "app": "model-small", "max_tokens": 2000}]
    policy = GatewayConfig.model_validate({"models": models, **config})
    made = World(policy, speed, engine_app, database, replicas, authenticator, sink)
    servers = (*(replica.server for replica in made.replicas), made.server)
    await asyncio.gather(*(server.start() for server in servers))
    try:
        yield made
    finally:
        await made.gateway.close()
        await asyncio.gather(*(server.stop() for server in servers))


@asynccontextmanager
async def signed_in_by(environ: Mapping[str, str]) -> AsyncIterator[World]:
    """Serve a gateway whose callers are checked as the settings in `environ` say."""
    authenticator = build_authenticator(load_settings(environ))
    async with world() as made:
        made.authenticator.behind = authenticator
        authenticator.start()
        try:
            yield made
        finally:
            await authenticator.close()


def client(of: World, *, connections: int = 100) -> httpx.AsyncClient:
    """Return a client that is signed in."""
    limits = httpx.Limits(max_connections=connections)
    return httpx.AsyncClient(
        base_url=of.url, headers=AUTHORIZATION, timeout=_PATIENCE_S, limits=limits
    )


def parse_events(text: str) -> list[Any]:
    """Return the data of server-sent events: objects, and `[DONE]` as it is."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [one if one == "[DONE]" else orjson.loads(one) for one in data]
