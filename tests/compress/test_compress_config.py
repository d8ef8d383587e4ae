"""Configs of compression: what is printed, what is refused and in which words, and that a command line can write them."""

import jax
import jax.numpy as jnp
import pytest
import tyro

from lmeff.compress.base import chain, identity
from lmeff.compress.config import MATRICES, Prune, Quantize, build, describe, parse_pattern, pruned, validate
from lmeff.compress.storage import Sparse
from lmeff.core.errors import ConfigError
from lmeff.core.tree import flatten
from lmeff.models.config import preset
from lmeff.models.transformer import param_specs

CFG = preset("tiny")
SPECS = param_specs(CFG)
REST = (".*", None)


def test_the_default_rules_are_every_matrix_of_the_blocks():
    for cfg in (CFG, preset("tiny", activation="gelu", bias="all", norm="layer", tied=False, qk_norm="head")):
        specs = param_specs(cfg)
        state = jax.eval_shape(lambda p, s=specs: build((Quantize(),)).init(p, s), _abstract(specs))
        want = {path for path, spec in flatten(specs).items() if spec.is_matmul and path.startswith("blocks/")}
        assert set(flatten(state.auxiliary[0])) == want
        validate((Prune(sparsity=0.5), Quantize()), specs, 0)


def _abstract(specs):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs, is_leaf=lambda x: hasattr(x, "letters")
    )


def test_every_leaf_has_a_row_and_shows_all_that_happens_to_it():
    transforms = (
        Prune(sparsity=0.25, scope="global", rules=(("blocks/mlp/up", True), (".*", False))),
        Prune(pattern="2:4", rules=(("blocks/mlp/down", True), (".*", False))),
        Quantize(method="lsq", rules=(("blocks/mlp/.*", "int4/g8"), REST)),
    )
    rows = {path: rest for path, *rest in describe(transforms, SPECS)}
    assert list(rows) == list(flatten(SPECS))
    assert rows["blocks/mlp/up"] == ["LDF", "2x32x64", "prune 0.25 globally, int4/g8 (lsq)"]
    assert rows["blocks/mlp/down"] == ["LFD", "2x64x32", "prune 2:4, int4/g8 (lsq)"]
    assert rows["blocks/mlp/gate"][-1] == "int4/g8 (lsq)"
    assert rows["embed/table"] == ["VD", "64x32", "-"]
    assert pruned(transforms, SPECS) == {"blocks/mlp/up": Sparse(), "blocks/mlp/down": Sparse(2, 4, -2)}
    assert {row[-1] for row in describe((), SPECS)} == {"-"}


OK = Prune(sparsity=0.5)
BAD = {
    "no sparsity": ((Prune(),), 0, r"compress\[0\]\.sparsity: got None"),
    "all pruned": ((Prune(sparsity=1.0),), 0, r"compress\[0\]\.sparsity: got 1\.0, expected .* \[0, 1\)"),
    "negative sparsity": ((OK, Prune(sparsity=-0.1)), 0, r"compress\[1\]\.sparsity: got -0\.1"),
    "sparsity against the pattern": (
        (Prune(sparsity=0.5, pattern="1:4"),),
        0,
        r"sparsity: got 0\.5, but .* prunes 0\.75",
    ),
    "no pattern": (
        (Prune(sparsity=0.5, pattern="two of four"),),
        0,
        r"compress\[0\]\.pattern: got 'two of four', .*'2:4'",
    ),
    "n above m": ((Prune(pattern="4:2"),), 0, r"pattern: got '4:2'"),
    "n is zero": ((Prune(pattern="0:4"),), 0, r"pattern: got '0:4'"),
    "m does not divide": (
        (Prune(pattern="2:7"),),
        0,
        r"compress\[0\]\.pattern: '2:7' .* dim D of 'blocks/attn/wq', which is 32 and no",
    ),
    "global pattern": (
        (Prune(pattern="2:4", scope="global"),),
        0,
        r"compress\[0\]\.scope: got 'global' with the pattern",
    ),
    "scope": ((Prune(sparsity=0.5, scope="layer"),), 0, r"compress\[0\]\.scope: got 'layer', expected one of"),
    "schedule without steps": (
        (Prune(sparsity=0.5, end=1),),
        0,
        r"compress\[0\]\.end: got 1, .* trains for 0 steps.*at once",
    ),
    "schedule too long": ((Prune(sparsity=0.5, end=101),), 100, r"compress\[0\]\.end: got 101, .* 100 steps"),
    "end before begin": ((Prune(sparsity=0.5, begin=5, end=4),), 9, r"begin, end, every: got 5, 4, 1"),
    "never": ((Prune(sparsity=0.5, end=4, every=0),), 9, r"begin, end, every: got 0, 4, 0"),
    "format": (
        (Quantize(rules=((MATRICES, "int8"), ("embed/.*", "int9"), REST)),),
        0,
        r"compress\[0\]\.rules\[1\]: .*got 'int9'",
    ),
    "empty group": ((Quantize(rules=((MATRICES, "int4/g0"), REST)),), 0, r"compress\[0\]\.rules\[0\]: .*size >= 1"),
    "method": ((Quantize(method="gptq"),), 0, r"compress\[0\]\.method: got 'gptq', expected one of"),
    "unknown path": (
        (OK, Quantize(rules=(("blocks/mlp/upp", "int8"), REST))),
        0,
        r"compress\[1\]\.rules\[0\]: 'blocks/mlp/upp' .*Nearest: 'blocks/mlp/up'",
    ),
    "shadowed rule": (
        (Quantize(rules=((".*", None), (MATRICES, "int8"))),),
        0,
        r"compress\[0\]\.rules\[1\]: .*never reached",
    ),
    "not total": ((Quantize(rules=((MATRICES, "int8"),)),), 0, r"compress\[0\]\.rules: no rule matches 'embed/table'"),
    "no expression": (
        (Quantize(rules=(("blocks/(", "int8"), REST)),),
        0,
        r"compress\[0\]\.rules\[0\]: .*not a regular expression",
    ),
    "a norm is quantized": (
        (Quantize(rules=((".*", "int8"),)),),
        0,
        r"compress\[0\]\.rules: choose 'blocks/attn_norm/scale'",
    ),
    "a norm is pruned": (
        (Prune(sparsity=0.5, rules=(("final_norm/scale", True), (".*", False))),),
        0,
        r"rules: choose 'final_norm/scale'",
    ),
    "quantization first": ((Quantize(), OK), 0, r"member 0 of 2 packs the weights"),
    "quantized twice": ((Quantize(), Quantize()), 0, r"member 0 of 2 packs the weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_with_their_place(name):
    transforms, steps, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        validate(transforms, SPECS, steps)


def test_the_place_can_be_a_stage():
    with pytest.raises(ConfigError, match=r"^recipe\[3\]\.compress\[0\]\.sparsity"):
        validate((Prune(),), SPECS, 0, where="recipe[3].compress")


def test_what_is_right_passes():
    validate((), SPECS, 0)
    validate((OK, Quantize()), SPECS, 0)
    validate((Prune(sparsity=0.5, begin=2, end=10, every=3), Quantize(method="lsq")), SPECS, 10)
    validate((Prune(sparsity=0.75, pattern="1:4"),), SPECS, 0)
    validate((Quantize(rules=((MATRICES, "int4/g24"), ("embed/table", "int8"), REST)),), SPECS, 0)  # ragged groups
    assert parse_pattern("unstructured") is None
    assert parse_pattern("2:4") == (2, 4)


def test_no_transforms_is_the_identity():
    params = {"w": 1}
    made = build(())
    assert made.apply(params, made.init(params, {})) == params
    assert build(()).packs == identity().packs == chain().packs


def test_a_command_line_can_write_them():
    got = tyro.cli(Quantize, args=["--method", "lsq", "--rules", "blocks/.*", "int4/g32", ".*", "None"])
    assert got == Quantize(method="lsq", rules=(("blocks/.*", "int4/g32"), (".*", None)))
    got = tyro.cli(Prune, args=["--pattern", "2:4", "--end", "5", "--rules", "blocks/mlp/.*", "True", ".*", "False"])
    assert got == Prune(pattern="2:4", end=5, rules=(("blocks/mlp/.*", True), (".*", False)))
    assert tyro.cli(Prune, args=["--sparsity", "0.5"]) == OK
    both = tyro.cli(tuple[Prune | Quantize, ...], args=[], default=(OK, Quantize()))
    assert both == (OK, Quantize())
