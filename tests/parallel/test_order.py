"""Orders of tokens over the context axis: whole, reversible, balanced, and refused where they would be uneven."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.models.mask import Mask
from lmeff.models.tiles import Tiles
from lmeff.parallel.context import FORMS
from lmeff.parallel.order import CHUNKS, check_tokens, from_row, own_indices, reach, to_row, token_order, work


def test_every_form_has_an_order():
    assert CHUNKS.keys() == FORMS.keys()


def test_zigzag_of_three_devices():
    assert token_order("ring", 12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert token_order("ulysses", 12, 3).tolist() == list(range(12))
    assert token_order("ring", 7, 1).tolist() == list(range(7))


@pytest.mark.parametrize("form", CHUNKS)
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_there_and_back(form, devices):
    row = jnp.arange(2 * 48 * 3).reshape(2, 48, 3)
    placed = row[:, token_order(form, 48, devices)]
    np.testing.assert_array_equal(to_row(placed, devices, CHUNKS[form]), row)
    np.testing.assert_array_equal(from_row(row, devices, CHUNKS[form]), placed)


def tiles_of(device, other, devices, chunks, size, window):
    """How many tiles of one chunk attention's own loops go over."""
    t, s = (own_indices(n, devices, chunks, chunks * size) for n in (device, other))
    first, stop = Tiles(t, s, Mask(window, None), size).bounds()
    return int((stop - first).clip(0).sum())


@pytest.mark.parametrize("window", [None, 1, 2, 9, 30])
@pytest.mark.parametrize(("devices", "chunks"), [(2, 2), (3, 2), (8, 2), (4, 1)])
def test_work_is_what_the_loops_do(devices, chunks, window):
    size = 8
    done = [sum(tiles_of(i, j, devices, chunks, size, window) for j in range(devices)) for i in range(devices)]
    assert work(devices, chunks, size=size, window=window) == done


@pytest.mark.parametrize("devices", [2, 4, 8, 64])
def test_zigzag_balances_what_plain_order_does_not(devices):
    """In chunks of half a device's tokens, of which in plain order the last device has nearly all pairs to do."""
    zigzag, plain = work(devices, 2), work(devices, 1)
    assert max(zigzag) - min(zigzag) <= 1
    assert sum(zigzag) == 2 * devices * (2 * devices + 1) // 2, "all pairs of chunks on or below the diagonal"
    assert (min(plain), max(plain)) == (1, devices)
    longest, mean = max(plain), sum(plain) / devices
    assert longest / mean == pytest.approx(2 * devices / (devices + 1)), "the slowest of plain order"


@pytest.mark.parametrize("window", [None, 1, 2, 8, 9, 10, 17, 40, 1000])
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_the_ring_reaches_what_a_window_sees_and_no_further(devices, window):
    size = 8
    behind, ahead = reach(devices, 2, size, window)
    steps = {step for step in range(1, devices) if step <= behind or step >= devices - ahead}
    needed = {
        step
        for step in range(1, devices)
        if any(tiles_of(i, (i - step) % devices, devices, 2, size, window) for i in range(devices))
    }
    assert needed <= steps
    assert behind + ahead < devices
    if window is not None and window <= size + 1:
        assert steps == needed


@pytest.mark.parametrize(
    ("form", "tokens", "devices", "message"),
    [
        (
            "ring",
            24,
            8,
            r"here: got rows of 24 tokens, expected a multiple of 2 x mesh\.context = 16.*Set it to 16 or 32",
        ),
        ("gather", 8, 8, r"2 x mesh\.context = 16.*Set it to 16, or lower"),
        ("ulysses", 12, 8, r"a multiple of mesh\.context = 8.*Set it to 8 or 16"),
    ],
)
def test_uneven_rows_are_refused(form, tokens, devices, message):
    with pytest.raises(ConfigError, match=message):
        check_tokens("here", form, tokens, devices)
