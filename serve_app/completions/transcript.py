"""What a stream has said, kept small while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# A frame takes some 200 bytes for a token of four. So many are kept before they are read.
_FOLD_BYTES = 8 * 1024


class Transcript:
    """The text of one stream, taken from its frames now and then, so that they need not be kept.

    Args:
        pieces: tells of whole frames which texts they hold, each with the number of its choice.
        keep_frames: whether the frames themselves are kept, too, for who asks again.
    """

    def __init__(
        self, pieces: Callable[[bytes], Iterable[tuple[int, str]]], *, keep_frames: bool = False
    ) -> None:
        self._pieces = pieces
        self._keep_frames = keep_frames
        self._unread = bytearray()
        self._read = bytearray()
        self._texts: dict[int, list[str]] = {}
        self._begun = False

    def add(self, frames: bytes) -> None:
        """Take whole frames, as they went to the client."""
        self._begun = True
        self._unread += frames
        if len(self._unread) >= _FOLD_BYTES:
            self._fold()

    @property
    def frames(self) -> bytes:
        """All frames until now; of use only where they are kept."""
        return bytes(self._read + self._unread)

    @property
    def text(self) -> str | None:
        """The text until now, choice by choice; None where nothing came."""
        if not self._begun:
            return None
        self._fold()
        return "\n\n".join("".join(parts) for _, parts in sorted(self._texts.items()))

    def _fold(self) -> None:
        """Keep the text of the frames in their place."""
        frames = bytes(self._unread)
        self._unread = bytearray()
        if self._keep_frames:
            self._read += frames
        said: dict[int, list[str]] = {}
        for choice, text in self._pieces(frames):
            said.setdefault(choice, []).append(text)
        for choice, texts in said.items():
            self._texts.setdefault(choice, []).append("".join(texts))
