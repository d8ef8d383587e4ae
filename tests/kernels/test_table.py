"""What the table chooses, what it says where nothing is better, and that no choice changes a number: alone, on meshes and in gradients."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.dims import contracted
from lmeff.core.numerics import dequantize, parse_format, quantize
from lmeff.core.ops import Numerics, make_einsum
from lmeff.core.packed import packed_einsum
from lmeff.kernels import table
from lmeff.kernels.table import FORMS, RULES, Product, choose, form_of, packed_product
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.packed import packed_on

EQUATIONS = {
    "BTD,DHC->BTHC": ((8, 1, 64), (64, 4, 16)),
    "BTHC,HCD->BTD": ((8, 1, 4, 16), (4, 16, 64)),
    "BTD,DF->BTF": ((8, 2, 64), (64, 128)),
    "BTF,FD->BTD": ((8, 2, 128), (128, 64)),
    "ND,VD->NV": ((3, 64), (256, 64)),
    "BTD,DV->BTV": ((8, 1, 64), (64, 256)),
}


@functools.cache
def operands(equation, format, x_shape=None, dtype=jnp.float32):
    own, w_shape = EQUATIONS[equation]
    left, right, out = re.split(",|->", equation)
    axes = tuple(i - len(right) for i, c in enumerate(right) if c in left and c not in out)
    parsed = parse_format(format)
    axes = tuple(range(-len(right), 0)) if parsed.granularity == "tensor" else axes
    x = jax.random.normal(jax.random.key(0), x_shape or own, dtype)
    return x, jax.jit(quantize, static_argnums=(1, 2))(
        jax.random.normal(jax.random.key(1), w_shape) + 0.1, parsed, axes
    )


def some(**fields):
    given = {"platform": "tpu", "tokens": 8, "inputs": 256, "outputs": 512, "outputs_first": False, "dtype": "bfloat16"}
    return Product(**(given | {"weights": parse_format("int4/g32"), "paired": False} | fields))


CHOICES = [
    ("grouped weights on TPUs", {}, "weights"),
    ("codes of activations on TPUs", {"activations": parse_format("int8")}, "plain"),
    ("a scale an output on TPUs", {"weights": parse_format("int4")}, "plain"),
    ("many tokens on TPUs", {"tokens": 65}, "plain"),
    ("tied head on TPUs", {"outputs_first": True, "weights": parse_format("int4/g128")}, "weights"),
    ("few tokens on CPUs", {"platform": "cpu", "tokens": 64}, "blocks"),
    ("many tokens on CPUs", {"platform": "cpu", "tokens": 65}, "plain"),
    ("codes by four bits on GPUs", {"platform": "gpu", "activations": parse_format("int8")}, "widened"),
    ("many tokens and pairs on CPUs", {"platform": "cpu", "tokens": 999, "paired": True}, "blocks"),
]


@pytest.mark.parametrize(("fields", "form"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
def test_choices(fields, form, caplog):
    table._log.cache_clear()
    assert choose(some(**fields)) == form
    assert not caplog.records, "the best form needs no word"


FALLBACKS = [
    ("NVIDIA", {"platform": "gpu"}, "gpu: no kernel is written for this platform"),
    ("short groups", {"weights": parse_format("int4/g12")}, "groups of 12 along the first dim"),
    ("groups of a tied head", {"outputs_first": True}, "groups of 32 along the last dim"),
    ("wide tokens", {"tokens": 64, "inputs": 1 << 15}, "64 tokens of 32768 inputs"),
    ("fp8", {"weights": parse_format("fp8/g32")}, "groups of fp8/g32"),
]


@pytest.mark.parametrize(("fields", "words"), [c[1:] for c in FALLBACKS], ids=[c[0] for c in FALLBACKS])
def test_a_fallback_is_told_once(fields, words, caplog):
    table._log.cache_clear()
    with caplog.at_level(logging.WARNING, "lmeff.kernels"):
        assert [choose(some(**fields)) for _ in range(3)] == ["plain"] * 3
    assert len(caplog.records) == 1
    assert words in caplog.text


def test_every_rule_chooses_among_the_forms():
    assert {c[2] for c in CHOICES} == set(FORMS)
    assert set(RULES) == {"cpu", "gpu", "tpu"}


@pytest.mark.parametrize("format", ["int8", "int4/g8", "int8-affine/tensor"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_on_cpus_equal_the_plain_form(equation, format):
    x, w = operands(equation, format)
    made = jax.jit(functools.partial(packed_product, "cpu", equation))(x, w)
    want = np.einsum(equation, np.asarray(x, np.float64), np.asarray(dequantize(w), np.float64))
    np.testing.assert_allclose(made, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("format", ["int4", "int4-affine/g8"])
@pytest.mark.parametrize("equation", ["BTHC,HCD->BTD", "ND,VD->NV"])
def test_widened_codes_give_the_same_product(equation, format):
    x, w = operands(equation, format)
    axes = tuple(range(-len(contracted(equation)), 0))
    codes = quantize(x, parse_format("int8"), axes)
    made = jax.jit(functools.partial(packed_product, "gpu", equation))(codes, w)
    want = packed_einsum(equation, codes, w)
    np.testing.assert_allclose(made, want, atol=1e-6 * float(jnp.abs(want).max()))


def test_what_is_no_product_of_matrices_is_left_to_the_plain_form():
    x, w = operands("BTHC,HCD->BTD", "int8")
    assert form_of("cpu", "HC,HCD->HD", x[0, 0], w) == "plain"
    ragged = quantize(jnp.ones((4, 16, 64)), parse_format("int4/g12"), (-3, -2))
    assert form_of("cpu", "BTHC,HCD->BTD", x, ragged) == "plain"
    assert packed_product("cpu", "BTHC,HCD->BTD", x, ragged) is None


@pytest.mark.parametrize("activations", ["int8", "int8-affine", None])
def test_the_seam_takes_the_form_and_keeps_its_dtype(activations):
    numerics = Numerics((("s", parse_format(activations)),)) if activations else Numerics()
    asked = []

    def packed(equation, x, w):
        asked.append(type(x).__name__)
        return packed_product("cpu", equation, x, w)

    x, w = operands("BTD,DF->BTF", "int4/g8", dtype=jnp.bfloat16)
    made = make_einsum(numerics, {}, packed=packed)("BTD,DF->BTF", x, w, site="s")
    want = make_einsum(numerics, {})("BTD,DF->BTF", x.astype(jnp.float32), w, site="s")
    assert made.dtype == jnp.bfloat16
    assert len(asked) == 1
    np.testing.assert_allclose(made.astype(jnp.float32), want, atol=0.01 * float(jnp.abs(want).max()))


PLANS = {"fsdp x tensor": MeshPlan(fsdp=4, tensor=2), "data x context x tensor": MeshPlan(context=2, tensor=2)}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_on_meshes_devices_multiply_their_own_parts(equation, plan, monkeypatch):
    monkeypatch.setattr(table, "FEW_ON_CPU", 4)  # of a device: all rows together are more
    layout = make_layout(PLANS[plan])
    for format in ("int8", "int4/g8"):
        x, w = operands(equation, format)
        made = jax.jit(functools.partial(packed_on, layout, equation))(x, w)
        assert made is not None, "a device has few tokens, though all together are more"
        want = np.einsum(equation, np.asarray(x, np.float64), np.asarray(dequantize(w), np.float64))
        np.testing.assert_allclose(made, want, atol=1e-6 * np.abs(want).max())


def test_summed_dims_that_are_cut_are_added_and_codes_are_gathered():
    layout = make_layout(MeshPlan(fsdp=4, tensor=2))
    x, w = operands("BTF,FD->BTD", "int8")
    place = functools.partial(layout.sharding, shape=None)
    given = jax.device_put(x, place("B_F")), jax.device_put(w.q, place("FD"))
    call = jax.jit(
        lambda x, q: packed_on(layout, "BTF,FD->BTD", x, w.__class__(q, w.scale, None, w.format, w.axes, w.dtype))
    )
    text = call.lower(*given).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathers
    assert all("= s8[" in line for line in gathers), "what fsdp cuts comes as codes"
    assert " all-reduce(" in text


def test_groups_that_do_not_divide_are_told(caplog):
    table._log.cache_clear()
    layout = make_layout(MeshPlan(tensor=8))
    x, w = operands("BTF,FD->BTD", "int4/g32")
    assert packed_on(layout, "BTF,FD->BTD", x, w) is None
    assert "groups of 'int4/g32' do not divide over tensor 8" in caplog.text


@pytest.mark.parametrize(("equation", "format"), [("BTD,DF->BTF", "int4/g32"), ("ND,VD->NV", "int4/g128")])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_activations_have_gradients(platform, equation, format, monkeypatch):
    """A student's activations may pass a packed teacher; on TPUs through the kernel, whose gradient is one by hand."""
    monkeypatch.setattr(table, "weight_product", functools.partial(table.weight_product, interpret=True))
    x, w = operands(equation, format)

    def pulled(product):
        made, pull = jax.vjp(product, x)
        return pull(jnp.cos(jnp.arange(float(made.size))).reshape(made.shape))[0]

    want = pulled(lambda x: jnp.einsum(equation, x, dequantize(w)))
    got = pulled(lambda x: packed_product(platform, equation, x, w))
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
