"""Text while it is written is the text of all ids."""

import numpy as np
import pytest

from lmeff.data.tokenizer import ByteTokenizer
from lmeff.infer.stream import TextStream

TEXT = "naïve — 深い 🙂 END of it"


def pieces(text, stops=()):
    """What comes out with each byte, and at the end."""
    stream = TextStream(decoder=ByteTokenizer().decode, stops=tuple(stops))
    given = []
    for byte in text.encode():
        given.append(stream.add(byte))
        if stream.stopped:
            break
    return [*given, stream.finish()], stream


def test_characters_come_whole():
    given, stream = pieces(TEXT)
    assert "".join(given) == stream.text == TEXT
    assert not any("\ufffd" in piece for piece in given)
    assert given[: len(b"na") + 2] == ["n", "a", "", "ï"]


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["END"], "naïve — 深い 🙂 "),
        (["ENDURE", "ED"], TEXT),
        (["い", "ve"], "naï"),
        (["f it", "of"], "naïve — 深い 🙂 END "),
        ([TEXT], ""),
    ],
    ids=["inside", "only-begun", "first-of-two", "overlapping", "all"],
)
def test_a_stop_string_ends_the_text_wherever_tokens_end(stops, text):
    given, stream = pieces(TEXT, stops)
    assert "".join(given) == stream.text == text
    assert stream.stopped == (text != TEXT)


def test_nothing_of_a_stop_string_is_shown_before_it_is_known():
    given, _ = pieces("abXYc", ["XYZ"])
    assert given == ["a", "b", "", "", "XYc", ""]


def test_bytes_that_are_no_text_do_not_wait_for_ever():
    stream = TextStream(decoder=ByteTokenizer().decode)
    given = [stream.add(0xFF) for _ in range(40)]
    assert sum(map(len, given)) >= 35


def test_a_token_is_decoded_after_those_before_it():
    """A decoder that drops the space of its first word, as SentencePiece does."""
    words = ["▁to", "▁be", "▁or", "▁not"]
    stream = TextStream(decoder=lambda ids: "".join(words[i] for i in ids).replace("▁", " ").lstrip())
    assert [stream.add(i) for i in range(4)] == ["to", " be", " or", " not"]
    assert stream.text == stream.decoder(np.arange(4))
