"""Every token is predicted exactly once, whatever the lengths; rows keep the contract of a batch; little is wasted."""

import numpy as np
import pytest

from lmeff.data import packing

PAD = 999


def make(lengths):
    """Tokens that are all different, so that a misplaced one is seen."""
    starts = np.cumsum([0, *lengths])
    return np.arange(starts[-1]) + 1000, starts


def lay_all(tokens, rows, sequence):
    batch, document_BT = packing.empty(len(rows), sequence, PAD)
    for row in range(len(rows)):
        packing.lay(tokens, rows, row, batch, document_BT, row)
    return batch, document_BT


CASES = {
    "short": [2, 3, 2, 4],
    "exact": [9, 17, 9],
    "long": [40, 2, 100, 18, 10],
    "random": np.random.default_rng(0).integers(2, 60, 200).tolist(),
    "one": [2],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pack", [packing.pack_dense, packing.pack_ordered])
@pytest.mark.parametrize("sequence", [2, 8, 64])
def test_every_token_is_predicted_exactly_once(case, pack, sequence):
    tokens, starts = make(CASES[case])
    batch, document_BT = lay_all(tokens, pack(packing.cut(starts, sequence), sequence), sequence)
    counted = batch.weights == 1
    expected = np.delete(tokens, starts[:-1])  # all but the first of each document
    assert np.array_equal(np.sort(batch.targets[counted]), expected)
    assert np.array_equal(batch.targets[counted], batch.tokens[counted] + 1)
    assert np.array_equal(
        document_BT[counted], np.searchsorted(starts, batch.targets[counted] - 1000, side="right") - 1
    )
    per_document = np.bincount(document_BT[counted], minlength=len(starts) - 1)
    assert np.array_equal(per_document, np.diff(starts) - 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pack", [packing.pack_dense, packing.pack_ordered])
def test_rows_keep_the_contract_of_a_batch(case, pack):
    tokens, starts = make(CASES[case])
    batch, document_BT = lay_all(tokens, pack(packing.cut(starts, 8), 8), 8)
    for name, dtype in zip(batch._fields, ["int32", "int32", "int32", "int32", "float32"]):
        assert getattr(batch, name).dtype == dtype
    assert np.array_equal(batch.weights, (batch.segments > 0).astype(np.float32))
    padding = batch.segments == 0
    assert (batch.tokens[padding] == PAD).all()
    assert (batch.targets[padding] == PAD).all()
    assert (batch.positions[padding] == 0).all()
    assert (document_BT[padding] == -1).all()
    for row in range(len(batch.segments)):
        used = int((batch.segments[row] > 0).sum())
        assert used > 0
        assert (batch.segments[row, used:] == 0).all()
        steps = np.diff(batch.segments[row, :used])
        assert batch.segments[row, 0] == 1
        assert np.isin(steps, [0, 1]).all()
        for segment in range(1, batch.segments[row].max() + 1):
            inside = batch.segments[row] == segment
            assert np.array_equal(batch.positions[row, inside], np.arange(inside.sum()))
            assert np.array_equal(batch.tokens[row, inside][1:], batch.targets[row, inside][:-1])
            assert len(set(document_BT[row, inside])) == 1


def test_ordered_rows_follow_the_text():
    tokens, starts = make(CASES["random"])
    batch, _ = lay_all(tokens, packing.pack_ordered(packing.cut(starts, 16), 16), 16)
    assert (np.diff(batch.targets[batch.weights == 1]) > 0).all()


def test_dense_rows_waste_little():
    _, starts = make(np.random.default_rng(1).integers(2, 300, 3000).tolist())
    pieces = packing.cut(starts, 64)
    dense, ordered = packing.pack_dense(pieces, 64), packing.pack_ordered(pieces, 64)
    assert pieces.length.sum() / (64 * len(dense)) > 0.999
    assert len(dense) < len(ordered)


def test_best_fit_against_the_plain_algorithm():
    def plain(lengths, room):
        bins = []
        for i, length in enumerate(lengths):
            fitting = [b for b in bins if b[0] >= length]
            best = min(fitting, key=lambda b: b[0], default=None)
            if best is None:
                best = [room, []]
                bins.append(best)
            best[0] -= length
            best[1].append(i)
        return bins

    rng = np.random.default_rng(2)
    for _ in range(30):
        lengths = sorted(rng.integers(1, 20, 60).tolist(), reverse=True)
        got, expected = packing._best_fit(lengths, 20), plain(lengths, 20)
        rooms = [sorted(20 - sum(lengths[i] for i in bin) for bin in got), sorted(b[0] for b in expected)]
        assert rooms[0] == rooms[1]
