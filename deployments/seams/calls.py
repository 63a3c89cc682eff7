"""Calls through Ray Serve: tried again while a replica is away, and their errors mapped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.backoff import Backoff
from serve_app.errors import CompAIError, HandedOver, RequestError
from serve_app.log_setup import log_failure

logger = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0

_REPLICA_LOST = (RayError, RayServeException)

Answer = TypeVar("Answer")


class CallFailed(CompAIError):
    """A call through Serve failed, on its way or over there."""


class CallsBroken(CompAIError):
    """What this replica regularly tells or asks others is told or asked no more."""


async def called(call: Callable[..., Awaitable[Answer]], *args: object) -> Answer:
    """Return what a call through Serve returns, where it is all the same how it fails.

    Raises:
        CallFailed: for anything. Over gRPC Serve raises here what was raised over there, as it
            was, so there is no class that all of it belongs to.
    """
    try:
        return await call(*args)
    except Exception as error:
        raise CallFailed(f"A call failed of {type(error).__name__}.") from error


async def until_answered(
    call: Callable[[], Awaitable[Answer]],
    unavailable: type[RequestError],
    overloaded: type[RequestError],
) -> Answer:
    """Return what `call` returns; where a replica is lost, call again, with growing pauses.

    So too where one has handed over, and Ray does not know its successor yet.

    It goes on until it is cancelled: the caller sets the time.

    Raises:
        RequestError: the one that was raised over there; or `overloaded`, where too many wait
            for a replica; or `unavailable`, where anything else failed over there.
    """
    backoff = Backoff(_RETRY_FIRST_S, _RETRY_MOST_S)
    while True:
        try:
            return await call()
        except HandedOver:
            logger.info("replica has handed over, trying again")
        except BackPressureError as error:
            raise overloaded(retry_after_s=1) from error
        except RequestError as error:
            # Ray raises a copy that is also its own error; the cause is the one we raised.
            raise (error.cause if isinstance(error, RayTaskError) else error) from None
        except Exception as error:  # noqa: BLE001  whatever the code over there raises
            # Ray makes errors of its own of those that another try can help. All others are of
            # the code over there: as they were raised, or, without gRPC, Ray's copy of them.
            if isinstance(error, RayTaskError) or not isinstance(error, _REPLICA_LOST):
                log_failure(logger, "call", error)
                raise unavailable() from None
            logger.warning("replica lost, trying again: %s", type(error).__name__)
        await asyncio.sleep(backoff.next_s())


async def answers(call: Callable[..., Awaitable[object]], *args: object, timeout_s: float) -> bool:
    """Tell whether a call through Serve ends well in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await called(call, *args)
    except (CallFailed, TimeoutError):
        return False
    return True
