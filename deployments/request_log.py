"""The request log as a Ray Serve deployment: each replica owns a spool.

A replica takes a spool of its node that nobody holds, and empties those that were left there.
Appends wait in groups for one fsync, so very many may be under way at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray import serve
from ray.util.metrics import Counter, Gauge, Histogram

from deployments.direct import Direct
from deployments.options import RequestLogOptions
from deployments.tracing import replica_sink
from deployments.upkeep import build_upkeep
from serve_app.accounts import request_log
from serve_app.accounts.drift import EngineCounts, EngineReading
from serve_app.accounts.procedures import log_handlers
from serve_app.accounts.redaction import Redactor
from serve_app.accounts.request_log import LogConfig, LogStatus
from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.accounts.spool import Spool
from serve_app.accounts.spool_folders import SpoolFolders
from serve_app.accounts.spooled import SpooledForm
from serve_app.config import parse_config
from serve_app.errors import LogUnavailable
from serve_app.lazy_pool import build_pool
from serve_app.log_setup import log_as_json
from serve_app.records import RequestRecord
from serve_app.settings import load_settings

_WRITE_BOUNDARIES_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]


class RayLogMetrics:
    """The log's measurements in Ray's metrics; they come out as `ray_comp_ai_log_…`."""

    def __init__(self) -> None:
        self._depth = Gauge(
            "comp_ai_log_spool_depth", description="Records on disk that PostgreSQL lacks."
        )
        self._lag = Gauge(
            "comp_ai_log_lag_s", description="Age of the oldest record that PostgreSQL lacks, s."
        )
        self._full = Gauge(
            "comp_ai_log_full", description="1 while there is no room for new records, else 0."
        )
        self._write = Histogram(
            "comp_ai_postgres_write_s",
            description="Time to write one batch of records to PostgreSQL, s.",
            boundaries=_WRITE_BOUNDARIES_S,
        )
        self._not_redacted = Counter(
            "comp_ai_bodies_not_redacted",
            description="Bodies that could not be redacted, and of which the shape alone is kept.",
        )
        self._rows = Counter(
            "comp_ai_log_rows_written", description="Records written to PostgreSQL."
        )

    def spool_depth(self, rows: int) -> None:
        """Set the gauge."""
        self._depth.set(rows)

    def spool_full(self, full: bool) -> None:
        """Set the gauge."""
        self._full.set(int(full))

    def spool_lag_s(self, seconds: float) -> None:
        """Set the gauge."""
        self._lag.set(seconds)

    def postgres_write_s(self, seconds: float) -> None:
        """Observe one batch."""
        self._write.observe(seconds)

    def bodies_not_redacted(self, rows: int) -> None:
        """Count bodies."""
        self._not_redacted.inc(rows)

    def rows_written(self, rows: int) -> None:
        """Count rows; Ray refuses to count 0."""
        self._rows.inc(rows)


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=10_000,
    health_check_period_s=2,
    health_check_timeout_s=10,
    # Longer than `drain_timeout_s`, so that the drain is not cut off by Serve.
    graceful_shutdown_timeout_s=30,
    # A line for each append would cost more than the append.
    logging_config={"enable_access_log": False},
    ray_actor_options={"num_cpus": 0},
)
class RequestLog(Direct):
    """Takes records from the gateways and sees them into PostgreSQL."""

    async def __init__(self, options: dict[str, Any] | None = None) -> None:  # type: ignore[misc]
        """Take a spool; PostgreSQL need not be there.

        Raises:
            ConfigError: an option or a setting is wrong, or no spool can be opened.
        """
        log_as_json(sys.stdout)
        self._options = parse_config(RequestLogOptions, options or {}, "request_log")
        settings = load_settings()
        masters = MasterKeys.of(settings.sealing)
        root = self._options.spool_folder or settings.service.home_path / "spool"
        make = partial(
            Spool,
            form=SpooledForm(masters),
            lock_timeout_s=0,
            max_bytes=self._options.spool_max_bytes,
            min_free_bytes=self._options.spool_min_free_bytes,
        )
        folders = SpoolFolders(root, make)
        self._spans = replica_sink(settings.tracing, "request-log")
        self._log = request_log.RequestLog(
            spool=await folders.take(),
            postgres=settings.postgres,
            keys=SubjectKeys(masters),
            redactor=Redactor(self._options.redaction_regions),
            metrics=RayLogMetrics(),
            config=LogConfig(
                batch_rows=self._options.batch_rows, write_timeout_s=self._options.write_timeout_s
            ),
            folders=folders,
            sink=self._spans,
        )
        await self._log.start()
        # Of several replicas one does it at a time.
        self._upkeep = build_upkeep(
            settings, self._options.retention, self._options.ended_keys_days
        )
        self._upkeep.start()
        self._counts = EngineCounts(
            build_pool(
                settings.postgres,
                application_name="comp-ai engine-counts",
                max_size=1,
                name="engine_counts",
            )
        )
        await self.open_direct(log_handlers(self.append_all), settings.service)

    async def append(self, record: RequestRecord) -> None:
        """Return once `record` is on disk; safe to repeat.

        Raises:
            LogUnavailable: the record is not known to be safe.
        """
        await self._log.append(record)

    async def append_all(self, records: Sequence[RequestRecord]) -> list[bool]:
        """Tell of each of `records` whether it is on disk; see `append`."""
        return await asyncio.gather(*(self._appended(record) for record in records))

    async def has_room(self) -> bool:
        """Tell whether new requests may count on being recorded here."""
        return await self._log.has_room()

    async def status(self) -> LogStatus:
        """Return how the log is."""
        return await self._log.status()

    async def engine_counted(self, reading: EngineReading) -> None:
        """See `EngineCounts.note`; model replicas tell it now and then."""
        await self._counts.note(reading)

    async def _appended(self, record: RequestRecord) -> bool:
        try:
            await self._log.append(record)
        except LogUnavailable:
            return False
        return True

    async def check_health(self) -> None:
        """Raise LogBroken or UpkeepBroken where a part of ours died: Serve then replaces us."""
        self._log.check()
        self._upkeep.check()

    async def __del__(self) -> None:
        """Called by Serve when the replica stops: move what can be moved, keep the rest."""
        await self.close_direct()
        await self._upkeep.close()
        await self._counts.close()
        await self._log.drain(self._options.drain_timeout_s)
        await self._log.close()
        if self._spans is not None:
            await self._spans.close()
