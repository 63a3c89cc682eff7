"""What an Idempotency-Key changes on the path of a request."""

from __future__ import annotations

from starlette.datastructures import Headers

from serve_app.completions.exchange import Exchange
from serve_app.completions.parts import Document
from serve_app.completions.reply import STREAM_TYPE
from serve_app.config import Bodies, GatewayConfig
from serve_app.errors import UnsupportedParameter
from serve_app.identity.principal import Principal
from serve_app.lazy_pool import LazyPool
from serve_app.stored import idempotency
from serve_app.stored.idempotency import Claim, KeyUse, StoredAnswer, read_key
from serve_app.stored.vault import Vault

_NO_KEYS = (
    "Answers to such requests are not kept in full (`bodies: {}`), so none can be sent again. "
    "Leave out Idempotency-Key."
)


class Keyed:
    """The hold of one request on its key; without a key nothing happens here."""

    def __init__(
        self, config: GatewayConfig, database: LazyPool, vault: Vault, exchange: Exchange
    ) -> None:
        self._config = config
        self._database = database
        self._vault = vault
        self._exchange = exchange
        self._claim: Claim | None = None
        self.replay: StoredAnswer | None = None

    async def claim(self, headers: Headers, principal: Principal) -> bool:
        """Claim the key that `headers` name; True if its answer is there, in `replay`.

        Raises:
            InvalidRequest: what stands there is no key, or the policy forbids to keep answers.
            IdempotencyConflict, IdempotencyMismatch, AnswerNotKept, StoreUnavailable:
                see `Claim.take`.
        """
        key = read_key(headers.getlist(idempotency.HEADER))
        if key is None:
            return False
        exchange = self._exchange
        if exchange.bodies is not Bodies.FULL:
            message = _NO_KEYS.format(exchange.bodies)
            raise UnsupportedParameter(message, param="Idempotency-Key")
        use = KeyUse.of(principal.id, key, exchange.route, exchange.request_body or b"")
        self._claim = Claim(self._database, self._vault, self._config.idempotency, use)
        self.replay = await self._claim.take()
        return self.replay is not None

    @property
    def claimed(self) -> bool:
        """Whether the answer is to be kept for who asks again."""
        return self._claim is not None

    async def end(self, answer: Document) -> None:
        """Keep a whole answer for who asks again; after anything else the key is free again."""
        if self._claim is None or self.replay is not None:
            return
        if self._exchange.error is not None:
            await self._claim.release()
        else:
            await self._claim.keep(self._sent(answer))

    def _sent(self, answer: Document) -> StoredAnswer:
        if not self._exchange.stream:
            return StoredAnswer(status=200, media_type=answer.media_type, body=answer.body)
        # Without the comments that kept it alive: they said that it was not there yet.
        transcript = self._exchange.transcript
        frames = b"" if transcript is None else transcript.frames
        return StoredAnswer(status=200, media_type=STREAM_TYPE, body=frames + answer.body)
