"""The upkeep of the accounts, joined to Ray's metrics. The RequestLog deployment runs it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from serve_app.accounts.drift import drift_task
from serve_app.accounts.partitions import partitions_task
from serve_app.accounts.retention.policy import DataClass, RetentionPolicy
from serve_app.accounts.retention.task import retention_task
from serve_app.accounts.upkeep import Upkeep
from serve_app.backup.watch import backup_task
from serve_app.identity.key_sweep import key_sweep_task
from serve_app.settings import Settings
from serve_app.usage.folding import usage_tasks


def build_upkeep(
    settings: Settings, retention: RetentionPolicy, ended_keys_days: int | None
) -> Upkeep:
    """Return the upkeep with its tasks, not started."""
    metrics = RayUpkeepMetrics()
    tasks = [
        partitions_task(metrics),
        drift_task(metrics),
        retention_task(retention, metrics),
        *usage_tasks(),
        backup_task(settings.backup.path_below(settings.service.home_path), metrics),
    ]
    if ended_keys_days is not None:
        tasks.append(key_sweep_task(ended_keys_days, metrics))
    return Upkeep(settings.postgres, tasks, metrics)


class KeptGauge:
    """A gauge that is set seldom. Ray drops one that is not set again, so it is told again."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...] = ()) -> None:
        self._gauge = Gauge(name, description, labels)
        self._labels = labels
        self._values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, *labels: str) -> None:
        """Set it, for `labels` in their order."""
        self._values[labels] = value
        self._tell(labels, value)

    def tell_again(self) -> None:
        """Set every value again."""
        for labels, value in self._values.items():
            self._tell(labels, value)

    def forget(self) -> None:
        """Tell nothing any more: another process does."""
        self._values.clear()

    def _tell(self, labels: tuple[str, ...], value: float) -> None:
        self._gauge.set(value, dict(zip(self._labels, labels, strict=True)))


class RayUpkeepMetrics:
    """The upkeep's measurements; they come out as `ray_comp_ai_upkeep_…`."""

    def __init__(self) -> None:
        self._last_success = KeptGauge(
            "comp_ai_upkeep_last_success_s",
            "When a task of the upkeep was last done, in s since 1970.",
            ("task",),
        )
        self._took = KeptGauge("comp_ai_upkeep_took_s", "How long it took then, s.", ("task",))
        self._failures = Counter(
            "comp_ai_upkeep_failures", "Tasks of the upkeep that failed.", ("task",)
        )
        self._ahead = KeptGauge(
            "comp_ai_partitions_ahead", "Months after this one that have their partitions."
        )
        self._dropped = Counter(
            "comp_ai_retention_partitions_dropped", "Months that went whole, by class.", ("data",)
        )
        self._removed = Counter(
            "comp_ai_retention_rows", "Rows that were past their time and went.", ("data",)
        )
        self._oldest = KeptGauge(
            "comp_ai_oldest_row_age_s", "Age of the oldest row of a class of data, s.", ("data",)
        )
        self._backup_age = KeptGauge(
            "comp_ai_backup_age_s", "Age of the newest backup that was read back, s."
        )
        self._drift = KeptGauge(
            "comp_ai_accounting_drift_ratio",
            "Tokens that the log has too many, as a part of what the engines counted; "
            "negative where it lacks some.",
            ("model",),
        )

    def upkeep_succeeded(self, task: str, seconds: float) -> None:
        """See `UpkeepMetrics.upkeep_succeeded`."""
        self._last_success.set(time.time(), task)
        self._took.set(seconds, task)

    def upkeep_failed(self, task: str) -> None:
        """See `UpkeepMetrics.upkeep_failed`."""
        self._failures.inc(1, {"task": task})

    def partitions_ahead(self, months: int) -> None:
        """See `PartitionMetrics.partitions_ahead`."""
        self._ahead.set(months)

    def retention_removed(self, data: DataClass, partitions: int, rows: int) -> None:
        """See `RetentionMetrics.retention_removed`."""
        # Ray refuses to count 0.
        for counter, count in ((self._dropped, partitions), (self._removed, rows)):
            if count:
                counter.inc(count, {"data": data.value})

    def ended_keys_removed(self, rows: int) -> None:
        """See `KeySweepMetrics.ended_keys_removed`."""
        self._removed.inc(rows, {"data": "api_keys"})

    def oldest_row_age_s(self, data: DataClass, seconds: float) -> None:
        """See `RetentionMetrics.oldest_row_age_s`."""
        self._oldest.set(seconds, data.value)

    def accounting_drift(self, ratios: Mapping[str, float]) -> None:
        """See `DriftMetrics.accounting_drift`."""
        self._drift.forget()
        for model, ratio in ratios.items():
            self._drift.set(ratio, model)

    def backup_age_s(self, seconds: float | None) -> None:
        """See `BackupMetrics.backup_age_s`."""
        self._backup_age.forget()
        if seconds is not None:
            self._backup_age.set(seconds)

    def upkeep_goes_on(self) -> None:
        """See `UpkeepMetrics.upkeep_goes_on`."""
        for gauge in self._gauges():
            gauge.tell_again()

    def upkeep_left(self) -> None:
        """See `UpkeepMetrics.upkeep_left`."""
        for gauge in self._gauges():
            gauge.forget()

    def _gauges(self) -> list[KeptGauge]:
        return [value for value in vars(self).values() if isinstance(value, KeptGauge)]
