"""The gateway's Serve application: Gateway, Limits and RequestLog."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.flags import check_flags
from deployments.limits import Limits
from deployments.metrics import RayBatchMetrics, RayGatewayMetrics
from deployments.options import RequestLogOptions
from deployments.request_log import RequestLog
from deployments.seams import RayLimitKeeper, RayModelPool, RayRecordSink
from deployments.tracing import replica_sink
from serve_app.accounts.sealing.master_keys import MasterKeys
from serve_app.accounts.sealing.subject_keys import SubjectKeys
from serve_app.audit.policy import PolicyJournal
from serve_app.batches.runner import BatchRunner
from serve_app.completions import gateway
from serve_app.completions.body import Defaults
from serve_app.completions.parts import Parts, Tracing
from serve_app.completions.upstream import new_session
from serve_app.config import Bodies, GatewayConfig, WhenLogFull, parse_config
from serve_app.errors import ConfigError
from serve_app.heap import HeapTrimmer
from serve_app.http_app import Check, create_app
from serve_app.identity.authenticator import build_authenticator
from serve_app.lazy_pool import build_pool
from serve_app.log_setup import log_as_json
from serve_app.queueing.pool import QueuedPool
from serve_app.read_pool import build_read_pool
from serve_app.request_line import RequestLines
from serve_app.settings import TracingSettings, load_settings
from serve_app.stored.sweeper import Sweeper
from serve_app.stored.vault import Vault
from serve_app.tracing.sampling import Sampling
from serve_app.tracing.spans import SpanSink


class GatewayArgs(BaseModel):
    """`args` of the gateway's Serve application. Policy stands in `user_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_log: RequestLogOptions = Field(
        default=RequestLogOptions(), description="Options of the request log."
    )


def build(args: dict[str, Any]) -> Application:
    """Build the gateway's Serve application. Raises ConfigError where `args` are wrong."""
    options = parse_config(GatewayArgs, args, "args").request_log
    return _bind(Gateway, _bind(Limits), _bind(RequestLog, options.model_dump()))


def _tracing(settings: TracingSettings, sink: SpanSink | None) -> Tracing | None:
    if sink is None:
        return None
    return Tracing(sampling=Sampling(settings.ratio, settings.trust_parents), sink=sink)


def _bind(deployment: Any, *args: Any) -> Application:
    # To a type checker a decorated deployment is still its class.
    return deployment.bind(*args)


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=2000,
    # Serve finds a dead replica by these checks, so they bound how long it is missed.
    health_check_period_s=2,
    health_check_timeout_s=10,
)
@serve.ingress()
class Gateway:
    """Joins the parts of a gateway and serves its HTTP app."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, limits: DeploymentHandle, request_log: DeploymentHandle
    ) -> None:
        log_as_json(sys.stdout)
        check_flags(os.environ)
        settings = load_settings()
        self._authenticator = build_authenticator(settings)
        self._authenticator.start()
        self._limits = RayLimitKeeper(limits)
        self._limits.start()
        self._log = RayRecordSink(request_log)
        self._log.start()
        metrics = RayGatewayMetrics()
        session = new_session()
        self._models = QueuedPool(RayModelPool(session), metrics)
        self._models.start()
        self._masters = MasterKeys.of(settings.sealing)
        self._spans = replica_sink(settings.tracing, "gateway")
        self._parts = Parts(
            authenticator=self._authenticator,
            limits=self._limits,
            models=self._models,
            log=self._log,
            metrics=metrics,
            lines=RequestLines(sys.stdout),
            session=session,
            database=build_pool(
                settings.postgres,
                application_name="comp-ai-gateway",
                max_size=settings.postgres.pool_size,
            ),
            reports=build_read_pool(settings.postgres, application_name="comp-ai-reports"),
            defaults=Defaults(settings.service.max_tokens, settings.service.temperature),
            masters=self._masters,
            vault=Vault(SubjectKeys(self._masters)),
            tracing=_tracing(settings.tracing, self._spans),
        )
        self._trimmer = HeapTrimmer()
        self._trimmer.start()
        self._sweeper = Sweeper(self._parts.database)
        self._sweeper.start()
        self._journal = PolicyJournal(self._parts.database)
        self._gateway: gateway.Gateway | None = None
        self._batch_pool = build_pool(
            settings.postgres,
            application_name="comp-ai-batches",
            max_size=settings.postgres.batch_pool_size,
            name="batches",
        )
        self._batches: BatchRunner | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the policy in `user_config`. Raises ConfigError where it is wrong."""
        config = parse_config(GatewayConfig, user_config, "user_config")
        if (most := config.bodies.most) is not Bodies.NONE:
            self._masters.require(f"a key, as `bodies` is {most}")
        if self._gateway is None:
            self._gateway = gateway.Gateway(config, self._parts)
            self._batches = BatchRunner(self._gateway, self._batch_pool, RayBatchMetrics())
            self._batches.start()
        else:
            self._gateway.config = config
        self._journal.note(config.model_dump(mode="json"))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP app; Serve calls this after the constructor."""
        return create_app(self._configured, self._checks)

    async def check_health(self) -> None:
        """Fail while there is no policy, so that the deployment says so.

        Raise CallsBroken where the limits are told of nothing more, or the request log is watched
        no more: Serve then replaces us.
        """
        self._configured()
        self._limits.check()
        self._log.check()

    async def __del__(self) -> None:
        """Finish what is under way, then close; Serve calls this after it has drained."""
        await self._trimmer.close()
        await self._sweeper.close()
        await self._journal.close()
        if self._batches is not None:
            await self._batches.close()
        if self._gateway is not None:
            await self._gateway.close()
        await self._limits.close()
        await self._log.close()
        await self._authenticator.close()
        if self._spans is not None:
            await self._spans.close()

    def _configured(self) -> gateway.Gateway:
        if self._gateway is None:
            raise ConfigError(
                "user_config", None, "the gateway's policy, see docs/configuration.md"
            )
        return self._gateway

    def _checks(self) -> list[Check]:
        config = self._configured().config
        refuses = config.when_log_full is WhenLogFull.REFUSE
        return [
            Check("limits", self._limits.works),
            Check("request_log", partial(self._log.works, room=refuses)),
            *(Check(f"model {m.name}", partial(self._models.ready, m)) for m in config.models),
        ]
