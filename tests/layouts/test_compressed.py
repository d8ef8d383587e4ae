"""Compressed reductions: their bytes in the compiled program, what they leave out, and that they compose with the step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec, abstract
from lmeff.parallel.compressed import Reduce, as_matrices, from_matrices, make_reducer, quantize_blocks
from lmeff.parallel.hlo import collectives
from lmeff.parallel.mesh import MeshPlan, make_layout, partitions
from lmeff.parallel.region import Kept, Region, regional
from tests.layouts.trial import UNOPTIMIZED

SPECS = {
    "experts": ParamSpec(letters="LEFD", shape=(2, 2, 48, 32), contract="F"),
    "norm": ParamSpec(letters="LD", shape=(2, 64)),
    "out": ParamSpec(letters="LHCD", shape=(2, 4, 16, 64), contract="HC"),
    "table": ParamSpec(letters="VD", shape=(96, 64), contract="D"),
    "up": ParamSpec(letters="LDF", shape=(2, 64, 96), contract="D"),
}
INT8, POWER = Reduce(block=128), Reduce(method="powersgd", rank=4)
ROWS = MeshPlan(data=8)
CUT = MeshPlan(data=2, fsdp=2, tensor=2)
EXPERTS = MeshPlan(data=2, fsdp=2, expert=2)


class Sum:
    """A compiled reduction of gradients that each device makes up from its index and a seed: part of it common to all, part its own."""

    def __init__(self, plan, config, rank=None):
        self.layout, self.reducer = make_layout(plan), make_reducer(config, SPECS)
        axes, shapes = self.layout.axes("B"), abstract(SPECS)
        cuts = partitions(shapes, SPECS, self.layout)
        region = Region(self.layout.within(axes), axes, cuts)
        state = self.reducer.init(region, shapes)
        places = jax.tree.map(
            lambda _, cut: NamedSharding(self.layout.mesh, cut), state, self.reducer.cuts(region, state)
        )
        self.state = jax.device_put(state, places)

        def local(layout, trainable, auxiliary, batch, seed):
            common = jax.random.key(seed)
            own = jax.random.fold_in(common, jax.lax.axis_index(axes) + 1)
            return {name: draw(common, name, x, rank) + draw(own, name, x, rank) for name, x in trainable.items()}, {}

        def fn(seed, state, step):
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
            run = regional(local, self.layout, axes, (cuts, (), jax.sharding.PartitionSpec()), self.reducer)
            total, _, state = run(zeros, (), jnp.zeros(self.layout.size(axes)), seed, Kept(state, step))
            return total, state

        out = jax.tree.map(lambda cut: NamedSharding(self.layout.mesh, cut), cuts)
        self.compiled = (
            jax.jit(fn, out_shardings=(out, places)).lower(np.int32(0), self.state, np.int32(0)).compile(UNOPTIMIZED)
        )

    def __call__(self, seed, step=0, state=None):
        total, state = self.compiled(np.int32(seed), self.state if state is None else state, np.int32(step))
        return {name: np.asarray(x) for name, x in total.items()}, state


def draw(key, name, like, rank):
    """A random leaf; of this rank where one is given."""
    key = jax.random.fold_in(key, sorted(SPECS).index(name))
    if rank is None or name == "norm":
        return jax.random.normal(key, like.shape)
    *stacks, rows, columns = as_matrices(like, SPECS[name]).shape
    left = jnp.sin(jnp.arange(rows)[:, None] * (1.0 + jnp.arange(rank)))  # the same space of columns on every device
    right = jax.random.normal(key, (*stacks, rank, columns))
    return from_matrices(left @ right, SPECS[name], like.shape)


@functools.cache
def summed(plan, config, rank=None):
    return Sum(plan, config, rank)


def sent(text, *, over):
    """Bytes that a device sends in a ring, of the collectives over groups of so many devices."""
    total = 0
    for c in collectives(text):
        count = len(next(iter(c.groups)))
        share = (count - 1) / count
        factor = {"all-reduce": 2 * share, "reduce-scatter": share * count, "all-gather": share, "all-to-all": share}
        total += factor[c.kind] * c.bytes if count == over else 0
    return total


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_int8_sends_about_a_quarter_of_the_bytes():
    exact, coded = (summed(ROWS, config).compiled.as_text() for config in (None, INT8))
    ratio = sent(coded, over=8) / sent(exact, over=8)
    print(f"\nint8, blocks of {INT8.block}: {ratio:.4f} of the bytes of float32, scales included")
    assert 0.25 < ratio <= 0.27
    found = collectives(coded)
    assert {d for c in found if c.largest > 2 * 64 * 8 for d in c.dtypes} == {"s8"}, (
        "beside codes only scales and norms"
    )


def test_int8_of_a_leaf_cut_over_fsdp_is_not_gathered_over_it():
    found = collectives(summed(CUT, INT8).compiled.as_text())
    fsdp = frozenset(map(frozenset, ((0, 2), (1, 3), (4, 6), (5, 7))))
    codes = [c for c in found if "s8" in c.dtypes]
    assert {c.kind for c in codes} == {"all-to-all", "all-gather"}
    assert not [c for c in codes if c.kind == "all-gather" and c.groups == fsdp]
    elements = sum(math.prod(spec.shape) for name, spec in SPECS.items() if name != "norm") // 2  # a half by tensor
    assert sum(c.elements for c in codes if c.kind == "all-to-all") == elements


@pytest.mark.parametrize(
    ("plan", "seeds"),
    [(ROWS, 16), (CUT, 16), (EXPERTS, 16), pytest.param(CUT, 256, marks=pytest.mark.slow)],
    ids=["rows", "cut", "experts", "cut-256"],
)
def test_int8_is_close_and_unbiased(plan, seeds):
    want, _ = summed(plan, None)(1)
    got = [summed(plan, INT8)(1, step)[0] for step in range(seeds)]
    for name, expected in want.items():
        single, of_mean = relative(got[0][name], expected), relative(sum(g[name] for g in got) / seeds, expected)
        print(f"\n{name}: error of one {single:.2e}, of the mean of {seeds} seeds {of_mean:.2e}", end="")
        assert single <= (1e-6 if name == "norm" else 1.2e-2)
        assert of_mean <= (1e-3 if seeds == 256 else 4e-3)
        assert name == "norm" or of_mean <= single / seeds**0.5 * 1.1, "errors of different seeds are independent"


def test_rounding_is_unbiased():
    x = jax.random.normal(jax.random.key(3), (64, 256))
    keys = jax.random.split(jax.random.key(4), 256)
    mean = jnp.mean(
        jax.lax.map(lambda key: jnp.prod(jnp.stack(jnp.broadcast_arrays(*quantize_blocks(x, key))), 0), keys), 0
    )
    assert relative(np.asarray(mean), np.asarray(x)) <= 1e-3


def test_rounding_is_a_function_of_the_step():
    reduce = summed(CUT, INT8)
    first, again, other = reduce(1, 5)[0], reduce(1, 5)[0], reduce(1, 6)[0]
    for name in ("experts", "out", "table", "up"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).mean() > 0.5


def test_blocks_keep_zeros_extremes_and_overflows():
    x = jnp.stack([jnp.zeros(16), jnp.linspace(-127, 127, 16), jnp.full(16, 1e-30), jnp.arange(16) * jnp.inf])
    x = x.at[3, 0].set(1.0)
    codes, scale = quantize_blocks(x, jax.random.key(0))
    got = np.asarray(codes * scale)
    assert (got[0] == 0).all()
    assert got[1, [0, -1]].tolist() == [-127, 127]
    np.testing.assert_allclose(got[2], 1e-30, rtol=1e-2)
    assert not np.isfinite(got[3]).any()
    assert not np.isfinite(
        np.asarray(jnp.prod(jnp.stack(quantize_blocks(x.at[3].set(jnp.nan), jax.random.key(0))[1:])))
    ), "NaN"


@pytest.mark.parametrize("plan", [ROWS, CUT, EXPERTS], ids=["rows", "cut", "experts"])
def test_powersgd_is_exact_on_matrices_of_its_rank(plan):
    want, _ = summed(plan, None, 2)(1)
    reduce = summed(plan, POWER, 2)
    got, state = reduce(1)
    for name, expected in want.items():
        assert relative(got[name], expected) <= 1e-5, name
    assert max(float(jnp.abs(kept.error).max()) for kept in state.values()) <= 1e-3


@pytest.mark.parametrize("plan", [ROWS, CUT, EXPERTS], ids=["rows", "cut", "experts"])
def test_powersgd_forgets_nothing(plan):
    """What was given is what was passed on and what the devices still keep, to rounding."""
    exact, reduce, state = summed(plan, None), summed(plan, POWER), None
    given, passed = [], []
    for step in range(6):
        given.append(exact(step)[0])
        total, state = reduce(step, step, state)
        passed.append(total)
    for name in given[0]:
        want, got = (sum(totals[name] for totals in log) for log in (given, passed))
        if name == "norm":
            assert relative(got, want) <= 1e-6
            continue
        assert relative(got, want) > 0.1, "it compresses"
        assert relative(got + np.asarray(state[name].error).sum(0), want) <= 1e-5, name


def test_powersgd_sends_its_factors():
    text, rank = summed(ROWS, POWER).compiled.as_text(), POWER.rank
    sides = {"experts": (4, 48, 32), "out": (2, 64, 64), "table": (1, 64, 96), "up": (2, 64, 96)}
    factors = sum(stacks * rank * (rows + columns) for stacks, rows, columns in sides.values())
    assert sum(c.elements for c in collectives(text)) == factors + 2 * 64
    assert {c.kind for c in collectives(text)} == {"all-reduce"}


def test_each_device_keeps_its_own_error():
    state = summed(CUT, POWER).state
    assert state["up"].error.shape == (4, 2, 64, 96)
    assert state["up"].error.addressable_shards[0].data.shape == (1, 2, 64, 48), "whole over fsdp"
    assert summed(EXPERTS, POWER).state["experts"].error.shape == (4, 2, 2, 48, 32)
    assert summed(EXPERTS, POWER).state["experts"].error.addressable_shards[0].data.shape == (1, 2, 1, 48, 32)


def test_config_refuses():
    for values, message in (
        ({"method": "powersdg"}, r"train\.reduce\.method: got 'powersdg'.*int8, powersgd; did you mean 'powersgd'"),
        ({"block": 8}, r"train\.reduce\.block: got 8, expected at least 16"),
        ({"rank": 0}, r"train\.reduce\.rank: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Reduce(**values)
