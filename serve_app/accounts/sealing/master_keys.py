"""The master keys of an installation: what opens the keys of its subjects.

They come from the settings and are kept nowhere else. The first is the current one; the others
open what they wrapped until it has been wrapped anew.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from typing import Self

from serve_app.accounts.sealing.aead import KEY_BYTES, Sealer, derive
from serve_app.errors import CompAIError, ConfigError
from serve_app.settings import SealingSettings

SETTING = "COMP_AI_MASTER_KEY"
_SEPARATOR = re.compile(r"[\s,]+")
_ID_BYTES = 8
_ALLOWED = f"one key or more, each the base64 of {KEY_BYTES} bytes, with lines or commas between"


class MasterKeyMissing(CompAIError):
    """A key of a subject was wrapped with a master key that is not among ours."""

    def __init__(self, master_key_id: str) -> None:
        self.master_key_id = master_key_id
        super().__init__(
            f"The master key {master_key_id} is not among those of {SETTING}, and keys of "
            "subjects are wrapped with it. Add it behind the current one."
        )


class NoMasterKey(CompAIError):
    """There is no master key, and a text is to be sealed."""


def new_master_key() -> str:
    """Return a new master key in the form of the setting."""
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


class MasterKeys:
    """The master keys; there may be none, and then nothing can be sealed."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {master_key_id(key): key for key in keys}
        self._wrapping = {name: Sealer(derive(key, "wrap")) for name, key in self._keys.items()}

    @classmethod
    def of(cls, settings: SealingSettings) -> Self:
        """Return the keys that the settings name. Raises ConfigError; it never shows them."""
        secret = settings.master_key
        return cls([]) if secret is None else cls.parse(secret.get_secret_value())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the keys in `text`. Raises ConfigError; it never shows them."""
        keys = [_decode(word) for word in _SEPARATOR.split(text.strip())]
        if len(set(keys)) < len(keys):
            raise ConfigError(SETTING, "(hidden)", "each key once")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the keys, the current one first."""
        return tuple(self._keys)

    @property
    def current_id(self) -> str:
        """The id of the current key. Raises NoMasterKey."""
        if not self._keys:
            raise NoMasterKey
        return self.ids[0]

    def require(self, why: str) -> None:
        """Raise ConfigError where there is no key; `why` says what is needed, as a phrase."""
        if not self._keys:
            raise ConfigError(SETTING, None, f"{why}; `comp-ai master-key new` makes one")

    def wrap(self, key: bytes, place: bytes) -> tuple[str, bytes]:
        """Return the current master key's id and `key` sealed with it. Raises NoMasterKey."""
        return self.current_id, self._wrapping[self.current_id].seal(key, place)

    def unwrap(self, master_key_id: str, wrapped: bytes, place: bytes) -> bytes:
        """Return the key in `wrapped`.

        Raises:
            MasterKeyMissing: it was wrapped with a master key that is not here.
            SealBroken: it was changed, or is of another place.
        """
        wrapping = self._wrapping.get(master_key_id)
        if wrapping is None:
            raise MasterKeyMissing(master_key_id)
        return wrapping.open(wrapped, place)

    def derive(self, purpose: str, master_key_id: str | None = None) -> bytes:
        """Return 32 bytes that a master key, the current one by default, gives for a purpose.

        They change with the master key. What must outlast it takes `SubjectKeys.service_key`.

        Raises:
            NoMasterKey: there is none.
            MasterKeyMissing: the one that is named is not here.
        """
        name = master_key_id or self.current_id
        if name not in self._keys:
            raise MasterKeyMissing(name)
        return derive(self._keys[name], purpose)


def master_key_id(key: bytes) -> str:
    """Return the public name of a master key: 16 hexadecimal digits that tell nothing of it."""
    return derive(key, "id")[:_ID_BYTES].hex()


def _decode(word: str) -> bytes:
    try:
        key = base64.b64decode(word, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(SETTING, "(hidden)", _ALLOWED)
    return key
