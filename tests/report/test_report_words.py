"""Numbers as people read them."""

import pytest

from lmeff.report import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (12.345, "12.3 s"),
        (0.0456, "45.6 ms"),
        (0.9996, "1 s"),
        (7.89e-4, "789 µs"),
        (0, "0 s"),
        (1e-9, "0.00100 µs"),
        (5400, "1 h 30 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_times_have_the_unit_that_suits_them(seconds, said):
    assert words.brief(seconds) == said
