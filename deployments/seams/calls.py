"""Calls through Ray Serve: tried again while a replica is away, and their errors mapped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.backoff import Backoff
from serve_app.errors import HandedOver, RequestError

logger = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.05
_RETRY_MOST_S = 1.0

Answer = TypeVar("Answer")

# However a call through Serve can fail, errors of the code over there included.
CALL_FAILED = (RayError, RayServeException, grpc.RpcError)


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
        except RayTaskError as error:
            logger.error("call failed: %s", type(error.cause).__name__)
            raise unavailable() from None
        except grpc.RpcError as error:
            # Ray makes errors of its own of those that another try can help.
            logger.error("call failed: %s", type(error).__name__)
            raise unavailable() from None
        except (RayError, RayServeException) as error:
            logger.warning("replica lost, trying again: %s", type(error).__name__)
        await asyncio.sleep(backoff.next_s())


async def answers(call: Any, timeout_s: float) -> bool:
    """Tell whether `call` ends well in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await call
    except (*CALL_FAILED, TimeoutError):
        return False
    return True
