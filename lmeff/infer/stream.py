"""Text of a row while it is written: characters whose bytes lie in several tokens, and strings that end a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)
PATIENCE = 4  # tokens that a character may lie in: it has at most four bytes


@dataclass(kw_only=True)
class TextStream:
    """Ids in, text out, as soon as it is certain.

    Text waits while its last character is broken (the next tokens may complete it) and while it may be the beginning of a stop string. The ids that
    are decoded together are those since the last piece of text and those of that piece, so that a token is never decoded without what it was written after.

    text:    what has been given out so far.
    stopped: whether a stop string was found; text then ends before it.
    ids, known, start: all ids; how many have become text; where decoding begins. waiting: text that may be the beginning of a stop string.
    """

    decoder: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    text: str = ""
    stopped: bool = False
    ids: list[int] = field(default_factory=list)
    known: int = 0
    start: int = 0
    waiting: str = ""

    def add(self, token: int) -> str:
        """The text that has become certain with this token."""
        self.ids.append(token)
        new = self._decoded()
        if new.endswith(BROKEN) and len(self.ids) - self.known <= PATIENCE:
            return ""
        self.start, self.known = self.known, len(self.ids)
        return self._give(new, final=False)

    def finish(self) -> str:
        """The text that was waiting; no more tokens come."""
        if self.stopped:
            return ""
        new = self._decoded()
        self.start, self.known = self.known, len(self.ids)
        return self._give(new, final=True)

    def _decoded(self) -> str:
        """The text of the ids that are not known yet, as it reads after those before."""
        before = self.decoder(self.ids[self.start : self.known])
        return self.decoder(self.ids[self.start :])[len(before) :]

    def _give(self, new: str, *, final: bool) -> str:
        waiting = self.waiting + new
        found = [at for at in (waiting.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, given, self.waiting = True, waiting[: min(found)], ""
        else:
            kept = 0 if final else max((_overlap(waiting, stop) for stop in self.stops), default=0)
            given, self.waiting = waiting[: len(waiting) - kept], waiting[len(waiting) - kept :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text may be the first of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
