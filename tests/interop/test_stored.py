"""Any part of a leaf is what NumPy cuts out of the whole, and going back gives the stored tensor."""

import itertools
import math

import numpy as np
import pytest

from lmeff.interop.stored import Stored, names, outermost, pieces, read_part, stored_shape, stored_value
from lmeff.interop.tensors import bounds_of

SIZES = {"D": 6, "H": 4, "K": 2, "C": 3, "F": 5, "V": 7, "L": 3, "E": 2}
RNG = np.random.default_rng(0)


class Files(dict):
    """Tensors in memory that tell how many numbers were read."""

    def __init__(self, values):
        super().__init__(values)
        self.count = 0

    def read(self, name, index):
        part = self[name][tuple(slice(*bounds) for bounds in bounds_of(self[name].shape, index))]
        self.count += part.size
        return part


CASES = {
    "heads first": ("LDHC", Stored("{L}.q", "HC D"), lambda x: x.reshape(4, 3, 6).transpose(2, 0, 1)),
    "heads last": ("LHCD", Stored("{L}.o", "D HC"), lambda x: x.reshape(6, 4, 3).transpose(1, 2, 0)),
    "a part of a fused dim": (
        "LDKC",
        Stored("{L}.qkv", "HC+KC+KC D", 1),
        lambda x: x[12:18].reshape(2, 3, 6).transpose(2, 0, 1),
    ),
    "the last part, inputs first": ("LDKC", Stored("{L}.c", "D HC+KC+KC", 2), lambda x: x[:, 18:].reshape(6, 2, 3)),
    "a bias": ("LKC", Stored("{L}.b", "HC+KC+KC", 1), lambda x: x[12:18].reshape(2, 3)),
    "experts": ("LEDF", Stored("{L}.{E}.w", "F D"), lambda x: x.T),
    "no stack": ("DV", Stored("head", "V D"), lambda x: x.T),
    "a vector": ("LD", Stored("{L}.norm", "D"), lambda x: x),
}
CUTS = (slice(None), slice(0, 1), slice(1, 3), slice(2, 2))


@pytest.mark.parametrize("case", CASES)
def test_every_cut_is_a_cut_of_the_whole(case):
    letters, stored, expected = CASES[case]
    shape = stored_shape(stored, SIZES)
    for name, at in names(stored, letters, SIZES):
        value = RNG.normal(size=shape)
        own = letters.removeprefix(stored.stacks(letters))
        assert len(at) == len(letters) - len(own)
        for index in itertools.product(CUTS, repeat=len(own)):
            files = Files({name: value})
            part = read_part(files, stored, letters, SIZES, name, index)
            np.testing.assert_array_equal(part, expected(value)[index])
            # Nothing is read but what was asked for, with heads whole.
            sizes = [SIZES[x] if x == "C" else len(range(SIZES[x])[cut]) for x, cut in zip(own, index, strict=True)]
            assert files.count == math.prod(sizes)
        break


def test_the_outermost_dim_is_the_one_whose_cuts_lie_together():
    assert [outermost(stored, letters) for letters, stored, _ in CASES.values()] == [1, 2, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("case", ["heads first", "heads last", "experts", "no stack", "a vector"])
def test_going_back_gives_the_stored_tensor(case):
    letters, stored, expected = CASES[case]
    values = {name: RNG.normal(size=stored_shape(stored, SIZES)) for name, _ in names(stored, letters, SIZES)}
    leaves = {at: expected(values[name]) for name, at in names(stored, letters, SIZES)}
    for name, found in pieces({"leaf": (letters, stored)}, SIZES).items():
        np.testing.assert_array_equal(stored_value(found, lambda _, at: leaves[at], SIZES), values[name])


@pytest.mark.parametrize("dims", ["HC+KC+KC D", "D HC+KC+KC"])
def test_fused_parts_come_together_in_order(dims):
    table = {
        "v": ("LDKC", Stored("{L}.qkv", dims, 2)),
        "q": ("LDHC", Stored("{L}.qkv", dims, 0)),
        "k": ("LDKC", Stored("{L}.qkv", dims, 1)),
    }
    found = pieces(table, SIZES)
    assert list(found) == ["0.qkv", "1.qkv", "2.qkv"]
    value = RNG.normal(size=stored_shape(table["q"][1], SIZES))

    def fetch(path, at):
        letters, stored = table[path]
        return read_part(Files({"x": value}), stored, letters, SIZES, "x", (slice(None),) * 3)

    np.testing.assert_array_equal(stored_value(found["1.qkv"], fetch, SIZES), value)
