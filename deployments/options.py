"""What the Serve config may say of models and of the request log. No Ray: the docs read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.accounts.retention.policy import RetentionPolicy
from serve_app.config import Name
from serve_app.identity.key_sweep import DEFAULT_DAYS


class AdapterArgs(BaseModel):
    """A LoRA adapter, loaded when the engine starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(description="Name that the engine serves the model with it under.")
    weights: str = Field(
        min_length=1,
        description="Folder of the adapter in PEFT's form (`adapter_config.json`), absolute or "
        "below `COMP_AI_MODEL_PATH`; or `hub:<organisation>/<adapter>`.",
    )


class ModelArgs(BaseModel):
    """`args` of a model's Serve application."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = Field(
        description="Name that the engine serves the model under; the same as in the gateway's "
        "policy."
    )
    weights: str = Field(
        min_length=1,
        description="Folder of the weights, absolute or below `COMP_AI_MODEL_PATH`; or "
        "`hub:<organisation>/<model>` to let the engine fetch them.",
    )
    device: Literal["cpu", "gpu"] = Field(description="What the engine computes on.")
    accelerator_type: str | None = Field(
        default=None, description="Ray's name of the GPU, for example H100; any where not set."
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="vLLM engine arguments, by their Python names."
    )
    adapters: tuple[AdapterArgs, ...] = Field(
        default=(), description="LoRA adapters that the engine serves beside the model."
    )
    stuck_after_s: float = Field(
        default=120,
        gt=0,
        description="How long an engine with requests may make no step before it is replaced.",
    )
    replica_cpus: float = Field(
        default=0.5, ge=0, description="CPUs that Ray sets aside for the replica's own process."
    )


class RequestLogOptions(BaseModel):
    """What the Serve config may say of the request log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spool_folder: Path | None = Field(
        default=None, description="Folder of the spools; `<COMP_AI_HOME>/spool` where not set."
    )
    spool_max_bytes: int | None = Field(
        default=None,
        ge=1024 * 1024,
        description="Largest spool of one replica; new requests are refused from 90 % of it on. "
        "No limit where not set.",
    )
    spool_min_free_bytes: int = Field(
        default=536_870_912,
        ge=0,
        description="Free bytes of the spool's disk below which new requests are refused or "
        "dropped, see `when_log_full`. Those under way use what is left.",
    )
    drain_timeout_s: float = Field(
        default=10.0, ge=0, description="Longest wait for PostgreSQL when the replica stops."
    )
    batch_rows: int = Field(default=1000, ge=1, le=10_000, description="Most rows in one write.")
    write_timeout_s: float = Field(default=30.0, gt=0, description="Longest time for one write.")
    redaction_regions: tuple[str, ...] = Field(
        default=("US", "DE"),
        description="Countries whose national telephone numbers are redacted, as ISO 3166 "
        "codes. International ones are found anyway.",
    )
    retention: RetentionPolicy = Field(
        default_factory=RetentionPolicy,
        description="How long each class of data is kept; what is not named is kept for ever.",
    )
    ended_keys_days: int | None = Field(
        default=DEFAULT_DAYS,
        ge=1,
        le=36_500,
        description="Days that an API key is kept after it was revoked or has expired; `null` "
        "is for ever.",
    )
