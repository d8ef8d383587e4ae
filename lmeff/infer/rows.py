"""What a row writes: its tokens, its text, and why it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import UsageError
from lmeff.infer.stream import TextStream

OnToken = Callable[[int, int, str], Any]
"""`on_token(row, id, text)`: called for each new token of a row, in order. `text` is what has become certain with it, "" without a decoder."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written after a prompt.

    ids:      int32 [N], the new tokens; the one that ended the row is the last of them.
    logprobs: float32 [N], of each under the model itself, before temperature and filters.
    reason:   why the row ended: "stop_id", "stop_text" or "length".
    text:     with a decoder, of the new tokens, up to a stop string and without a stop id; else None.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    reason: str
    text: str | None = None


class Stops(NamedTuple):
    """What ends a row, and how its text is read. Strings are looked for in the text of new tokens, wherever tokens begin and end."""

    ids: frozenset[int]
    texts: tuple[str, ...] = ()
    decoder: Callable[[Sequence[int]], str] | None = None

    def check(self) -> None:
        """Refuses strings that could not be found."""
        if self.texts and self.decoder is None:
            raise UsageError(
                "stop_texts: got strings without a decoder, expected decoder=tokenizer.decode: they are looked for in text"
            )
        if "" in self.texts:
            raise UsageError("stop_texts: got an empty string, expected at least one character: every text contains it")


@dataclass(kw_only=True)
class Row:
    """A row that is being written."""

    index: int
    limit: int
    stops: Stops
    on_token: OnToken | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = ""
    stream: TextStream | None = None

    def __post_init__(self) -> None:
        """Opens its text."""
        if self.stops.decoder is not None:
            self.stream = TextStream(decoder=self.stops.decoder, stops=self.stops.texts)

    def take(self, token: int, logprob: float) -> None:
        """The next token, unless the row has ended."""
        if self.reason:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        text = ""
        if token in self.stops.ids:
            self.reason = "stop_id"
        elif self.stream is not None:
            text = self.stream.add(token)
            self.reason = "stop_text" if self.stream.stopped else ""
        if not self.reason and len(self.ids) == self.limit:
            self.reason = "length"
        if self.reason and self.stream is not None:
            text += self.stream.finish()
        if self.on_token is not None:
            self.on_token(self.index, token, text)

    def completion(self) -> Completion:
        """All of it."""
        return Completion(
            ids=np.array(self.ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            reason=self.reason,
            text=None if self.stream is None else self.stream.text,
        )


def fresh_rows(count: int, limit: int, stops: Stops, on_token: OnToken | None) -> list[Row]:
    """Rows 0, 1, ... with nothing written."""
    stops.check()
    return [Row(index=i, limit=limit, stops=stops, on_token=on_token) for i in range(count)]
