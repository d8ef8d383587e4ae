"""What a cache holds, and how many bytes that takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.models import cached
from lmeff.models.cache import (
    CacheFormat,
    cache_bytes,
    cache_letters,
    cache_specs,
    empty_cache,
    groups,
    held,
    parse_cache,
)
from lmeff.models.cached import New, pack, unpack
from lmeff.models.config import preset
from lmeff.models.layers import period
from lmeff.plan.serving import cache_bytes as planned_bytes

FORMATS = ["float32", "bfloat16", "int8", "int4", "int8/channel4", "int4/channel4"]
CFG = preset("tiny", layers=1, heads=2, kv_heads=2, width=16)  # heads of 8 channels
write = jax.jit(cached.write, static_argnames=("layer", "format"))
write_prompt = jax.jit(cached.write_prompt, static_argnames=("layer", "format"))


def check_codes(codes, scale, x, bits, axis):
    """Scales by min-max, with 16 significant bits; codes of numbers divided by them, exactly."""
    qmax = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(scale, np.abs(x).max(axis) / qmax, rtol=2**-15)
    want = np.clip(np.round(x / np.expand_dims(scale, axis)), -qmax, qmax)
    np.testing.assert_array_equal(codes, want.astype(np.int8))


def keys(rows, tokens, seed=0):
    return np.random.default_rng(seed).normal(size=(2, rows, tokens, CFG.kv_heads, CFG.head_size)).astype(np.float32)


def fresh(format, rows, tokens, window=None, chunk=1):
    cfg = preset("tiny", layers=1, heads=2, kv_heads=2, width=16, window=window)
    return empty_cache(cache_specs(cfg, format, rows=rows, tokens=tokens, chunk=chunk)).stacks[0]


def prompt_of(lengths, tokens):
    positions = np.arange(tokens) * np.ones((len(lengths), 1), np.int32)
    return New(jnp.where(positions < np.array(lengths)[:, None], positions, -1), jnp.array(lengths))


def in_steps(format, k, v, lengths, sizes, **how):
    """The stack after the same tokens in pieces of these sizes, the last ones shorter where a row ends."""
    stack, done = fresh(format, len(lengths), **how), 0
    for size in sizes:
        positions = done + np.arange(size) * np.ones((len(lengths), 1), np.int32)
        real = positions < np.array(lengths)[:, None]
        new = New(jnp.where(real, positions, -1), jnp.minimum(jnp.array(lengths), done + size))
        stack = write(stack, 0, k[:, done : done + size], v[:, done : done + size], new, format)
        done += size
    return stack


@pytest.mark.parametrize("text", ["int8", "int4"])
def test_codes_are_the_oracles(text):
    format, (k, v), lengths = parse_cache(text), keys(2, 6), [6, 3]
    stack = write_prompt(fresh(format, 2, 8), 0, k, v, prompt_of(lengths, 6), format)
    for name, x in (("k", k), ("v", v)):
        codes_BKSC = np.asarray(unpack(getattr(stack, name), format))[0]
        scale_BKS = np.asarray(getattr(stack, f"{name}_scale"))[0]
        for row, length in enumerate(lengths):
            own = x[row, :length].swapaxes(0, 1)
            check_codes(codes_BKSC[row, :, :length], scale_BKS[row, :, :length], own, int(text[3]), -1)


@pytest.mark.parametrize("text", ["int8/channel4", "int4/channel4"])
def test_codes_by_channel_are_the_oracles(text):
    format, (k, v), lengths = parse_cache(text), keys(2, 10), [10, 3]
    stack = write_prompt(fresh(format, 2, 12), 0, k, v, prompt_of(lengths, 10), format)
    near = np.asarray(jnp.asarray(k).astype(jnp.bfloat16).astype(jnp.float32))
    for block in range(2):  # of the first row; the second has not filled any
        within = slice(4 * block, 4 * block + 4)
        codes_KSC = np.asarray(unpack(stack.k, format))[0, 0, :, within]
        scale_KC = np.asarray(stack.k_scale)[0, 0, :, block]
        check_codes(codes_KSC, scale_KC, near[0, within].swapaxes(0, 1), int(text[3]), 1)
    tail = np.asarray(stack.tail.astype(jnp.float32))[0]
    np.testing.assert_array_equal(tail[0, :, :2], near[0, 8:10].swapaxes(0, 1))
    np.testing.assert_array_equal(tail[1, :, :3], near[1, :3].swapaxes(0, 1))


def test_two_codes_of_four_bits_share_a_byte():
    codes = np.random.default_rng(0).integers(-7, 8, (3, 8)).astype(np.int8)
    format = parse_cache("int4")
    bytes_ = np.asarray(pack(jnp.asarray(codes), format))
    assert bytes_.shape == (3, 4)
    np.testing.assert_array_equal(bytes_.view(np.uint8) & 15, codes[:, :4].view(np.uint8) & 15)
    np.testing.assert_array_equal(bytes_.view(np.uint8) >> 4, codes[:, 4:].view(np.uint8) & 15)
    np.testing.assert_array_equal(unpack(jnp.asarray(bytes_), format), codes)


@pytest.mark.parametrize("window", [None, 5], ids=["all", "ring"])
@pytest.mark.parametrize("text", FORMATS)
def test_it_does_not_matter_how_tokens_came(text, window):
    """What is seen of a prompt written at once is what single tokens, or a few at once, leave; a ring comes around four times."""
    format, lengths, tokens = parse_cache(text), [19, 7], 20
    k, v = keys(2, tokens)
    how = {"tokens": tokens, "window": window, "chunk": 3}
    whole = write_prompt(fresh(format, 2, **how), 0, k, v, prompt_of(lengths, tokens), format)
    for sizes in ([1] * tokens, [2, 3] * 4):
        assert_same(format, whole, in_steps(format, k, v, lengths, sizes, **how), lengths, window or tokens)


@pytest.mark.parametrize("text", ["float32", "int4", "int8/channel4"])
def test_tokens_that_are_taken_back_leave_nothing(text):
    """Three tokens are written at a time and two of them taken back, each time wrong ones."""
    format, lengths, tokens = parse_cache(text), [19, 7], 20
    k, v = keys(2, tokens)
    how = {"tokens": tokens, "window": 5, "chunk": 3}
    whole, stack = (
        write_prompt(fresh(format, 2, **how), 0, k, v, prompt_of(lengths, tokens), format),
        fresh(format, 2, **how),
    )
    wrong_k, wrong_v = keys(2, tokens + 3, seed=1)
    for position in range(19):
        guess = slice(position, position + 3)
        own_k, own_v = wrong_k[:, guess].copy(), wrong_v[:, guess].copy()
        own_k[:, 0], own_v[:, 0] = k[:, position], v[:, position]
        positions = np.where(position < np.array(lengths)[:, None], position + np.arange(3), -1)
        new = New(
            jnp.asarray(positions), jnp.minimum(jnp.array(lengths), position) + jnp.asarray((positions >= 0).sum(1))
        )
        stack = write(stack, 0, own_k, own_v, new, format)
    assert_same(format, whole, stack, lengths, 5)


def assert_same(format, one, other, lengths, window):
    """Of each row, what its last `window` tokens left: values, keys in closed blocks, and the tail."""
    for row, length in enumerate(lengths):
        closed = length // format.block * format.block if format.by_channel else length
        recent = np.arange(max(0, length - window), length)
        for a, b, positions in (
            (one.v, other.v, recent),
            (one.v_scale, other.v_scale, recent),
            (one.k, other.k, recent[recent < closed]),
            (one.k_scale, other.k_scale, recent[recent < closed] // (format.block if format.by_channel else 1)),
            (one.tail, other.tail, np.arange(closed, length)),
        ):
            if a is not None:
                slots = positions % a.shape[3]
                np.testing.assert_array_equal(np.asarray(a)[0, row][:, slots], np.asarray(b)[0, row][:, slots])


def test_a_slot_holds_the_last_position_that_falls_on_it():
    got = np.asarray(held(4, jnp.array([0, 3, 4, 9])))
    assert got[0].max() < 0
    assert got[1].tolist() == [0, 1, 2, -1]
    assert got[2].tolist() == [0, 1, 2, 3]
    assert got[3].tolist() == [8, 5, 6, 7]


@pytest.mark.parametrize("text", ["float32", "bfloat16", "int8", "int4", "int8/channel32", "int4/channel32"])
@pytest.mark.parametrize(
    "cfg",
    [
        preset("tiny"),
        preset("tiny", window=64),
        preset("tiny", layers=5, window=64, full_layers=(1, 3)),
        preset("llama3_8b"),
    ],
    ids=["all", "window", "mixed", "llama3_8b"],
)
def test_bytes_are_the_planned_ones(text, cfg):
    specs = cache_specs(cfg, parse_cache(text), rows=3, tokens=512)
    assert cache_bytes(specs) == planned_bytes(cfg, text, 3, 512)
    if cfg.width < 100:
        assert cache_bytes(specs) == sum(x.nbytes for x in jax.tree.leaves(empty_cache(specs).stacks))


def test_layers_that_see_equally_far_share_a_stack():
    cfg = preset("tiny", layers=8, window=3, full_layers=(2, 5))
    assert groups(cfg) == ((3, (0, 1, 3, 4, 6, 7)), (None, (2, 5)))
    assert [place.window for place in period(cfg)] == [3, 3, None]
    found = {}
    for layer in range(8):
        place, turn = period(cfg)[layer % 3], layer // 3
        found.setdefault(place.stack, []).append((turn * place.growth + place.first, layer))
    assert found == {0: list(enumerate((0, 1, 3, 4, 6, 7))), 1: list(enumerate((2, 5)))}
    assert len(period(preset("tiny", layers=6))) == 1
    assert len(period(preset("tiny", layers=3, window=3, full_layers=(0,)))) == 3


def test_every_leaf_has_letters():
    specs = cache_specs(preset("tiny"), parse_cache("int8/channel4"), rows=2, tokens=8)
    for x, letters in zip(jax.tree.leaves(specs), jax.tree.leaves(cache_letters(specs)), strict=True):
        assert len(letters) == len(x.shape)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int3", "got 'int3', expected one of float32, bfloat16, int8, int4"),
        ("float32/channel", "scales by channel for float32"),
        ("int8/token", "got 'int8/token'"),
        ("int8/channel0", "blocks of 0 tokens"),
    ],
    ids=lambda x: x.split()[0],
)
def test_formats_that_do_not_exist_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_cache(text)


@pytest.mark.parametrize("text", [*FORMATS, "int4/channel64"])
def test_formats_are_their_text(text):
    assert str(parse_cache(text)) == text
    assert parse_cache("int4/channel") == CacheFormat(numbers="int4", keys="channel")
