"""Quantized matrices in the compressed-tensors layout: decoded bit by bit here, by the package itself, and by transformers; and read back without rounding."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import QTensor, dequantize, parse_format, quantize
from lmeff.interop.bits import pack, unpack, words
from lmeff.interop.compressed import (
    compressed_specs,
    compressed_tensors,
    fitted,
    quantization_config,
    read_matrix,
    read_schemes,
    scheme_for,
)

# (format of weights, of inputs, [out, in]); outputs that do not divide words, inputs that do not divide groups of packed codes.
CASES = [
    ("int8", None, (24, 40)),
    ("int8-affine", None, (24, 40)),
    ("int8/tensor", None, (6, 20)),
    ("int4/g8", None, (24, 40)),
    ("int4", None, (7, 36)),
    ("int4-affine/g8", None, (19, 40)),
    ("int4-affine", None, (7, 33)),
    ("int8-affine/g20", None, (5, 40)),
    ("int3-affine/g12", None, (11, 36)),
    ("int5/g8", None, (3, 24)),
    ("int6-affine/tensor", None, (9, 21)),
    ("int2/g32", None, (9, 64)),
    ("int4/g64", None, (9, 40)),
    ("int8", "int8", (24, 40)),
    ("int8/tensor", "int8-affine", (6, 20)),
    ("int4-affine/g8", "int8", (19, 40)),
    ("int8", "int8/tensor", (24, 40)),
    ("int8", "int8-affine/tensor", (24, 40)),
    ("fp8", None, (24, 40)),
    ("fp8/tensor", "fp8/tensor", (7, 33)),
    ("fp8", "fp8", (24, 40)),
    ("fp8/g8", None, (7, 40)),
]
IDS = [f"{weights}, {inputs or 'weights alone'}, {shape[0]}x{shape[1]}" for weights, inputs, shape in CASES]
RANGE = np.array([-1.5, 2.25])
each_case = pytest.mark.parametrize(("weights", "inputs", "shape"), CASES, ids=IDS)


def matrix(text, shape):
    """A matrix [out, in] whose outputs differ in size by orders of magnitude; one is 0."""
    random = np.random.default_rng(0)
    w = random.normal(size=shape) * np.exp(random.normal(size=(shape[0], 1)))
    w[2] = 0.0
    w += 0.2 if "affine" in text else 0.0
    format = parse_format(text)
    axes = (-2, -1) if format.granularity == "tensor" else (-1,)
    return fitted(jax.jit(quantize, static_argnums=(1, 2))(w.astype(np.float32), format, axes), "w")


@functools.cache
def made(weights, inputs, shape, name="m"):
    t = matrix(weights, shape)
    scheme = scheme_for(t.format, None if inputs is None else parse_format(inputs))
    return t, scheme, compressed_tensors(name, t, scheme, inputs=RANGE)


def decoded(found, scheme, shape):
    """The layout by its own words: code i of a row is bits i x b to i x b + b of the row's words, low bits first, 2^(b - 1) too high."""
    bits = scheme.weights.bits

    def spread(rows, count):
        made = np.empty((len(rows), count))
        for r, row in enumerate(rows):
            whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
            made[r] = [((whole >> (i * bits)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(count)]
        return made

    scale = found["m.weight_scale"].astype(np.float64)
    scale = scale.reshape(-1, 1) if scale.ndim == 1 else scale
    zero = found.get("m.weight_zero_point", np.zeros(1))
    if scheme.layout == "pack-quantized":
        assert tuple(found["m.weight_shape"]) == shape
        codes = spread(found["m.weight_packed"], shape[1])
        zero = spread(zero.T, shape[0]).T if zero.size > 1 or scheme.weights.symmetric is False else zero
    else:
        codes = found["m.weight"].astype(np.float64)
    group = scheme.weights.group or shape[1]
    scale, zero = (np.repeat(x, group, axis=1) if x.ndim > 1 and x.size > 1 else x for x in (scale, zero))
    return (codes - zero) * scale


@each_case
def test_a_decoder_of_the_words_gives_our_values(weights, inputs, shape):
    t, scheme, found = made(weights, inputs, shape)
    np.testing.assert_array_equal(decoded(found, scheme, shape).astype(np.float32), dequantize(t))


@each_case
def test_shapes_and_dtypes_are_known_before(weights, inputs, shape):
    _, scheme, found = made(weights, inputs, shape)
    specs = compressed_specs("m", shape, scheme)
    assert list(specs) == list(found)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}


@each_case
def test_what_is_written_is_read_back_bit_for_bit(weights, inputs, shape):
    t, scheme, found = made(weights, inputs, shape)
    config = json.loads(json.dumps(quantization_config({"m": scheme})))
    back_scheme = read_schemes(config, ["m"], "config.json")["m"]
    assert back_scheme == scheme
    back = read_matrix("m", shape, back_scheme, found.__getitem__)
    assert back.format == scheme.weights
    assert back.q.dtype == t.q.dtype
    np.testing.assert_array_equal(back.q.astype(np.float32), np.asarray(t.q).astype(np.float32))
    scale = np.broadcast_to(t.scale, back.scale.shape)
    np.testing.assert_array_equal(back.scale, scale)
    assert (back.zero is None) == (t.zero is None)
    if t.zero is not None:
        np.testing.assert_array_equal(back.zero, np.broadcast_to(t.zero, back.zero.shape))
    as_arrays = QTensor(
        *(None if x is None else jnp.asarray(x) for x in (back.q, back.scale, back.zero)),
        back.format,
        back.axes,
        back.dtype,
    )
    np.testing.assert_array_equal(dequantize(as_arrays), dequantize(t))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_packing_is_dense_and_loses_nothing(bits, count):
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, count)).astype(np.int8)
    packed = pack(codes, bits)
    assert packed.dtype == np.int32
    assert packed.shape == (5, words(count, bits)) == (5, -(-count * bits // 32))
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


def test_packing_in_parts_is_packing_at_once(monkeypatch):
    codes = np.random.default_rng(1).integers(-8, 8, (50, 37)).astype(np.int8)
    whole = pack(codes, 4)
    monkeypatch.setattr("lmeff.interop.bits.AT_ONCE", 37 * 3)
    np.testing.assert_array_equal(pack(codes, 4), whole)
    np.testing.assert_array_equal(unpack(whole, 4, 37), codes)


def test_a_ragged_group_is_refused_and_a_single_one_is_a_channel():
    with pytest.raises(
        ConfigError,
        match=r"layers.0.up: got the format int4/g32 over 344 inputs, whose last group has only 24.*such as 8\)",
    ):
        fitted(quantize(jnp.ones((4, 344)), parse_format("int4/g32"), (-1,)), "layers.0.up")
    single = fitted(quantize(jnp.ones((4, 40)), parse_format("int4-affine/g64"), (-1,)), "w")
    assert str(single.format) == "int4-affine"
    assert single.scale.shape == (4, 1)


def test_narrow_scales_are_rounded_only_when_asked_for():
    t = matrix("int8", (8, 40))
    scheme = scheme_for(t.format)
    narrow = compressed_tensors("m", t, scheme, scales=ml_dtypes.bfloat16)["m.weight_scale"]
    np.testing.assert_array_equal(narrow, np.asarray(t.scale).astype(ml_dtypes.bfloat16))
    back = read_matrix("m", (8, 40), scheme, compressed_tensors("m", t, scheme, scales=ml_dtypes.bfloat16).__getitem__)
    assert back.dtype == "bfloat16"


def test_static_inputs_have_their_scale_and_zero():
    _, _, found = made("int8", "int8-affine/tensor", (24, 40))
    step = found["m.input_scale"]
    assert step.shape == (1,)
    assert step[0] == pytest.approx(3.75 / 255, rel=2e-5)
    ends = [float((code - int(found["m.input_zero_point"][0])) * step[0]) for code in (-128, 127)]
    assert ends == pytest.approx([-1.5, 2.25], abs=float(step[0]))


LINEAR = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(12) for x in "qk"] + ["lm_head"]


def test_one_scheme_is_of_all_linear_layers_but_those_named():
    scheme = scheme_for(parse_format("int4/g32"))
    config = quantization_config(dict.fromkeys(LINEAR[:-1], scheme), ["lm_head"])
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }  # fmt: skip
    assert config["ignore"] == ["lm_head"]
    assert read_schemes(config, LINEAR, "c") == dict.fromkeys(LINEAR[:-1], scheme)


def test_several_schemes_say_each_their_modules():
    schemes = {name: scheme_for(parse_format("int8" if ".q_" in name else "fp8/tensor")) for name in LINEAR[:-1]}
    config = quantization_config(schemes, ["lm_head", "model.layers.3.mlp.gate", "model.layers.4.mlp.gate"])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [[rf"re:model\.layers\.\d+\.self_attn\.{x}_proj$"] for x in "qk"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head", r"re:model\.layers\.\d+\.mlp\.gate$"]
    assert read_schemes(config, [*LINEAR, "model.layers.0.self_attn.q_proj.deeper"], "c") == schemes


def test_keys_that_say_nothing_are_taken():
    scheme = scheme_for(parse_format("int8"))
    config = quantization_config({"m": scheme}) | {
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
        "version": "0.15.0",
    }
    assert read_schemes(config, ["m"], "config") == {"m": scheme}
    with pytest.raises(CheckpointError, match=r"config.sparsity_config: got .*sparse-24"):
        read_schemes(config | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["m"], "config")


REFUSED = {
    "a rotation": ({"transform_config": {"a": 1}}, r"config.transform_config"),
    "a cache": ({"kv_cache_scheme": {"num_bits": 8}}, r"config.kv_cache_scheme"),
    "blocks": ({"weights": {"strategy": "block", "block_structure": [128, 128]}}, r"group_0.weights.strategy: got block"),
    "float of 4 bits": ({"weights": {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 16}}, "num_bits: got 4, expected 8"),
    "a layout": ({"format": "nvfp4-pack-quantized"}, "format: got nvfp4-pack-quantized"),
    "static tokens": ({"input_activations": {"strategy": "token", "dynamic": False}}, "input_activations.dynamic: got False"),
    "outputs": ({"output_activations": {"num_bits": 8}}, "output_activations"),
    "dynamic weights": ({"weights": {"strategy": "channel", "dynamic": True}}, "weights.dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case):
    change, message = REFUSED[case]
    config = quantization_config({"m": scheme_for(parse_format("int8"))})
    (config if case in ("a rotation", "a cache") else config["config_groups"]["group_0"]).update(change)
    with pytest.raises(CheckpointError, match=message):
        read_schemes(config, ["m"], "config")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("m.weight_packed", np.zeros((24, 9), np.int32)),
        ("m.weight_packed", np.zeros((24, 5), np.int64)),
        ("m.weight_scale", np.zeros((23, 5), np.float32)),
        ("m.weight_zero_point", np.zeros((24, 5), np.int32)),
    ],
)
def test_tensors_of_other_shapes_are_refused(name, wrong):
    _, scheme, found = made("int4-affine/g8", None, (24, 40))
    with pytest.raises(CheckpointError, match=rf"{name}: got .*expected"):
        read_matrix("m", (24, 40), scheme, (found | {name: wrong}).__getitem__)


def torch_dict(found):
    """The package's view of a module's tensors."""
    torch = pytest.importorskip("torch")

    def convert(x):
        if x.dtype == ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(x.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        return torch.from_numpy(x.copy())

    return {name: convert(x) for name, x in found.items()}


@pytest.mark.oracle
@each_case
def test_the_package_decompresses_to_our_values(weights, inputs, shape):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    t, scheme, found = made(weights, inputs, shape)
    config = QuantizationConfig.model_validate(quantization_config({"m": scheme}))
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    state = {name.removeprefix("m."): x for name, x in torch_dict(found).items()}
    assert set(compressor.compression_param_names(group)) - {"weight_zero_point"} <= state.keys()
    got = compressor.decompress(state, group)["weight"].numpy()
    np.testing.assert_array_equal(got, dequantize(t))


@pytest.mark.oracle
@pytest.mark.parametrize("text", ["int4/g32", "int4-affine/g8", "int8", "int3/g12"])
def test_the_package_packs_the_same_words(text):
    """From our values and scales: its codes and zero points are ours."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    shape = (24, 96)
    t, scheme, found = made(text, None, shape)
    group = QuantizationConfig.model_validate(quantization_config({"m": scheme})).config_groups["group_0"]
    state = {"weight": torch.from_numpy(np.array(dequantize(t))), "weight_scale": torch.from_numpy(np.array(t.scale))}
    if t.zero is not None:
        state["weight_zero_point"] = torch.from_numpy(np.asarray(t.zero).astype(np.int8))
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, group)
    assert packed.keys() == {name.removeprefix("m.") for name in found}
    for name, x in packed.items():
        np.testing.assert_array_equal(x.numpy(), found[f"m.{name}"])


# What runs in transformers: one scheme for all, then several; untied, so that the head is a linear layer, left dense.
RUNS = {
    "int8": {".": ("int8", None)},
    "int4/g8": {".": ("int4/g8", None)},
    "int4-affine/g16": {".": ("int4-affine/g16", None)},
    "fp8": {".": ("fp8", None)},
    "int8 and inputs": {".": ("int8", "int8")},
    "several": {"self_attn": ("int8", None), "down_proj": ("fp8/tensor", None), "_proj": ("int4/g16", None)},
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", RUNS)
def test_transformers_runs_it_like_the_dequantized_model(case, tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(cfg).eval()
    schemes, stored = {}, {}
    for name, x in model.state_dict().items():
        chosen = next(
            (formats for part, formats in RUNS[case].items() if part in name and name.endswith("_proj.weight")), None
        )
        if chosen is None:
            stored[name] = x.clone()
            continue
        module = name.removesuffix(".weight")
        format = parse_format(chosen[0])
        w = jnp.asarray(x.numpy())
        t = fitted(quantize(w, format, (-2, -1) if format.granularity == "tensor" else (-1,)), module)
        schemes[module] = scheme_for(t.format, None if chosen[1] is None else parse_format(chosen[1]))
        stored |= torch_dict(compressed_tensors(module, t, schemes[module]))
        x.copy_(torch.from_numpy(np.array(dequantize(t))))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    told["quantization_config"] = quantization_config(schemes, ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(told))
    # Of packed zero points transformers (5.24) makes room for as many as there are outputs, unless it is asked for plain weights.
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if "affine" in case else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how).eval()
    ids = torch.arange(24).reshape(2, 12) % 64
    with torch.no_grad():
        got, want = loaded(ids).logits, model(ids).logits
    error = float((got - want).abs().max() / want.abs().max())
    if case == "int8 and inputs":  # the loaded one rounds its inputs too
        assert 1e-4 < error < 0.05
    else:
        assert error < 1e-6
    for module in schemes:
        np.testing.assert_array_equal(
            loaded.get_submodule(module).weight.detach().numpy(), model.get_submodule(module).weight.detach().numpy()
        )
