"""Models with packed leaves as compressed-tensors folders: every leaf comes back bit for bit, and transformers computes the same as with numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import is_qtensor, materialize, pair, parse_format, quantize
from lmeff.core.ops import Numerics
from lmeff.core.tree import flatten, unflatten
from lmeff.interop import hf
from lmeff.interop.compressed_folder import export, site_of
from lmeff.interop.compressed_load import load
from lmeff.interop.tensors import open_tensors
from lmeff.models.config import ModelConfig, MoE
from lmeff.models.transformer import param_specs, sites
from lmeff.parallel.mesh import MeshPlan, make_layout

ONE = make_layout(MeshPlan(), jax.devices()[:1])
LLAMA = ModelConfig(vocab=61, width=32, layers=2, heads=4, kv_heads=2, ffn=48, tied=False, context=64)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, bias="qkv", tied=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="head", head_width=12),
    "phi3": LLAMA,  # query, key and value in one matrix, gate and up in another
    "mixtral": dataclasses.replace(LLAMA, moe=MoE(experts=3, top_k=2)),
}
ALL, HEAD = r"blocks/(attn/w.|(mlp|moe)/(up|gate|down))", "head/w"
CASES = [
    ("llama", {"blocks": "int8"}),
    ("llama", {"blocks": "int8/tensor", "head/w": "int8"}),
    ("llama", {"blocks": "int4/g8"}),
    ("llama", {"attn": "int8-affine", "mlp": "int4-affine/g16", "embed": "int8"}),
    ("llama", {"attn": "fp8", "head/w": "fp8/tensor"}),
    ("llama", {"mlp": "int4/g16", "wo": "int4/g32"}),  # groups longer than a head
    ("qwen2", {"blocks": "int4-affine/g8"}),
    ("qwen3", {"blocks": "int3/g4"}),
    ("phi3", {"blocks": "int4/g8"}),
    ("phi3", {"blocks": "int8/tensor", "mlp/down": "fp8"}),
    ("mixtral", {"blocks": "int4/g16"}),
    ("mixtral", {"moe": "fp8"}),
]
IDS = [f"{family}, {', '.join(f'{where} {text}' for where, text in formats.items())}" for family, formats in CASES]
each_case = pytest.mark.parametrize(("family", "formats"), CASES, ids=IDS)


def model(family, formats):
    """Random leaves; the last word that is in a path says its format. Routers stay as they are."""
    cfg = CONFIGS[family]
    specs, random = flatten(param_specs(cfg)), np.random.default_rng(0)

    @jax.jit
    def packed(leaves):
        made = {}
        for path, x in leaves.items():
            text = [
                text
                for where, text in formats.items()
                if where in path and specs[path].is_matmul and not path.endswith("router")
            ]
            format = parse_format(text[-1]) if text else None
            axes = specs[path].own_axes if format is not None and format.granularity == "tensor" else specs[path].axes
            made[path] = x if format is None else quantize(x, format, axes)
        return made

    return cfg, unflatten(
        packed({path: random.normal(size=s.shape).astype(np.float32) * 0.1 for path, s in specs.items()})
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), err_msg=where)


@each_case
def test_every_leaf_comes_back_bit_for_bit(family, formats, tmp_path):
    cfg, params = model(family, formats)
    assert export(cfg, params, tmp_path / "m", family=family).name == family
    back = load(tmp_path / "m", ONE)
    assert back.numerics == Numerics()
    assert back.cfg.sizes == cfg.sizes
    leaves, found = flatten(params), flatten(back.params)
    assert leaves.keys() == found.keys()
    values = jax.jit(materialize)
    assert_same(values(back.params), values(params))
    for path, leaf in leaves.items():
        if path == "embed/table" or not is_qtensor(leaf):
            assert not is_qtensor(found[path])
            continue
        # The same codes; scales of which several are one may be said for each.
        np.testing.assert_array_equal(
            np.asarray(found[path].q).astype(np.float32), np.asarray(leaf.q).astype(np.float32), err_msg=path
        )
        if leaf.format.granularity != "tensor" and (leaf.format.group or 0) <= (
            cfg.head_size if path.endswith("wo") else 16
        ):
            assert_same(found[path], leaf)


def test_placed_on_a_mesh_it_is_the_same(tmp_path):
    cfg, params = model("llama", {"blocks": "int4/g8"})
    export(cfg, params, tmp_path / "m")
    layout = make_layout(MeshPlan(fsdp=2, tensor=2, data=2))
    back = load(tmp_path / "m", layout)
    assert_same(back.params, params)
    up = back.params["blocks"]["mlp"]["up"]
    assert not up.q.sharding.is_fully_replicated
    assert not up.scale.sharding.is_fully_replicated


def test_codes_that_lie_two_a_byte_are_written_like_any(tmp_path):
    """As `kernels.table.stored_for` keeps them for decoding on CPUs."""
    cfg, params = model("llama", {"mlp": "int4/g8"})
    paired = jax.tree.map(lambda x: pair(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)
    assert paired["blocks"]["mlp"]["up"].paired
    export(cfg, paired, tmp_path / "m")
    assert_same(load(tmp_path / "m", ONE).params, params)


def test_the_folder_says_what_it_is(tmp_path):
    cfg, params = model("mixtral", {"blocks": "int4/g16"})
    export(cfg, params, tmp_path / "m", keep={"eos_token_id": 2})
    told = json.loads((tmp_path / "m" / "config.json").read_text())
    assert told["model_type"] == "mixtral"
    assert told["eos_token_id"] == 2
    quantized = told["quantization_config"]
    assert quantized["format"] == "pack-quantized"
    assert quantized["config_groups"]["group_0"]["targets"] == ["Linear"] or len(quantized["config_groups"]) > 1
    assert quantized["ignore"] == [r"re:model\.layers\.\d+\.block_sparse_moe\.gate$", "lm_head"]
    tensors = open_tensors(tmp_path / "m")
    expert = "model.layers.1.block_sparse_moe.experts.2.w2"
    assert tensors[f"{expert}.weight_packed"].shape == (32, 6)
    assert tensors[f"{expert}.weight_scale"].shape == (32, 3)
    assert tensors["model.layers.0.block_sparse_moe.gate.weight"].shape == (3, 32)
    with pytest.raises(ConfigError, match="quantization_config"):
        hf.load(tmp_path / "m", ONE)


def test_a_tied_head_is_left_alone(tmp_path):
    cfg, params = model("qwen2", {"blocks": "int8", "embed": "int4"})
    export(cfg, params, tmp_path / "m")
    told = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ["lm_head"]
    table = open_tensors(tmp_path / "m").read("model.embed_tokens.weight")
    np.testing.assert_array_equal(table, jax.jit(materialize)(params)["embed"]["table"])


def test_formats_of_inputs(tmp_path):
    cfg, params = model("llama", {"blocks": "int8"})
    wanted = Numerics(tuple((site, parse_format("int8")) for site in sorted(sites(cfg)) if site != "head"))
    export(cfg, params, tmp_path / "m", numerics=wanted)
    back = load(tmp_path / "m", ONE)
    assert back.numerics == wanted
    assert load(tmp_path / "m", ONE, inputs=False).numerics == Numerics()
    told = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert told["format"] == "int-quantized"
    assert told["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True,
    }  # fmt: skip
    assert_same(back.params, params)


def test_static_inputs_have_the_scales_of_their_layers(tmp_path):
    cfg, params = model("llama", {"mlp/down": "fp8"})
    ranges = {"mlp.down": jnp.array([[-2.0, 1.0], [-3.0, 7.0]])}
    numerics = Numerics((("mlp.down", parse_format("fp8/tensor")),))
    export(cfg, params, tmp_path / "m", numerics=numerics, ranges=ranges)
    tensors = open_tensors(tmp_path / "m")
    found = [float(tensors.read(f"model.layers.{i}.mlp.down_proj.input_scale")[0]) for i in range(2)]
    assert found == pytest.approx([2 / 448, 7 / 448], rel=2e-5)
    with pytest.raises(CheckpointError, match="one scale for all tokens"):
        load(tmp_path / "m", ONE)
    assert_same(load(tmp_path / "m", ONE, inputs=False).params, params)


AT_HEAD = {"numerics": Numerics((("head", parse_format("int8")),))}
REFUSED = {
    "nothing packed": (LLAMA, {}, {}, "got no packed weight"),
    "a ragged group": (
        LLAMA,
        {"mlp": "int4/g20"},
        {},
        r"layers.0.mlp.\w+_proj.weight: got the format int4/g20 over 32 inputs.*such as 4\)",
    ),
    "a group ragged in heads": (
        LLAMA,
        {"wo": "int4/g6"},
        {},
        r"o_proj.weight: got the format int4/g6 over heads of 8 inputs",
    ),
    "parts of other formats": (
        LLAMA,
        {"attn": "int8", "wk": "int4"},
        {"family": "phi3"},
        r"qkv_proj.weight: got int8 for blocks/attn/wq and int4 for blocks/attn/wk",
    ),
    "a part without": (
        LLAMA,
        {"wq": "int8"},
        {"family": "phi3"},
        r"int8 for blocks/attn/wq and no format for blocks/attn/wk",
    ),
    "inputs of a dense head": (
        LLAMA,
        {"blocks": "int8"},
        AT_HEAD,
        "lm_head.weight: got inputs in int8 for a weight in floating",
    ),
    "inputs of a tied head": (CONFIGS["qwen2"], {"blocks": "int8"}, AT_HEAD, "got inputs of head in a format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_say_is_refused(case, tmp_path):
    cfg, formats, options, message = REFUSED[case]
    cfg, params = model(next(name for name, own in CONFIGS.items() if own == cfg), formats)
    with pytest.raises(ConfigError, match=message):
        export(cfg, params, tmp_path / "m", **options)
    assert [*tmp_path.iterdir()] == []


def test_conv1d_is_no_linear_layer(tmp_path):
    cfg = ModelConfig(
        vocab=61, width=24, layers=2, heads=3, kv_heads=3, ffn=96, norm="layer", activation="gelu", positions="learned", bias="all", context=32,
    )  # fmt: skip
    CONFIGS["gpt2"] = cfg
    _, params = model("gpt2", {"mlp": "int8"})
    with pytest.raises(
        ConfigError, match=r"h.0.mlp.c_fc.weight: got packed blocks/mlp/up, which this family stores as \[D F\]"
    ):
        export(cfg, params, tmp_path / "m")


def test_folders_that_do_not_fit_are_refused(tmp_path):
    cfg, params = model("llama", {"blocks": "int8"})
    export(cfg, params, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    whole = json.loads(file.read_text())
    told, ignored = whole["quantization_config"], ["lm_head", "re:.*up_proj"]
    changes = {
        r"expected one with the quant_method": {"quant_method": "gptq"},
        r"lacks model.layers.0.mlp.up_proj.weight, .*and has besides model.layers": {**told, "ignore": ignored},
        r"got layers of blocks/mlp/up in different formats": {
            **told,
            "ignore": ["lm_head", "model.layers.1.mlp.up_proj"],
        },
    }
    for message, change in changes.items():
        file.write_text(json.dumps({**whole, "quantization_config": change}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "m", ONE)


def test_names_of_sites():
    cfg = dataclasses.replace(LLAMA, moe=MoE(experts=2, top_k=1, shared=1))
    found = {site_of(path) for path, spec in flatten(param_specs(cfg)).items() if spec.is_matmul}
    assert set(sites(cfg)) <= found


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("family", "formats"), [CASES[0], CASES[2], CASES[4], CASES[8], CASES[9]], ids=[IDS[i] for i in (0, 2, 4, 8, 9)]
)
def test_transformers_computes_the_same_with_codes_as_with_numbers(family, formats, tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.set_num_threads(1)
    cfg, params = model(family, formats)
    export(cfg, params, tmp_path / "codes", family=family)
    hf.export(cfg, jax.jit(materialize)(params), tmp_path / "numbers", family=family)
    ids = torch.arange(24).reshape(2, 12) * 7 % 61
    found = []
    for name in ("codes", "numbers"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        with torch.no_grad():
            found.append(loaded(ids, use_cache=False).logits.numpy())
    assert np.abs(found[0] - found[1]).max() <= 1e-6 * np.abs(found[1]).max()
    assert np.abs(found[1]).max() > 1e-2


# As the package's own tools write them: symmetric codes down to -8, scales of any bits and in half precision, a scale for every output in one dim.
THEIRS = {
    "int4 in groups": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 8}},
    "int4 in groups longer than heads": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}},
    "int8 with zero points": {"weights": {"num_bits": 8, "symmetric": False, "strategy": "channel"}},
    "int8 and inputs": {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "fp8 and inputs": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    },
    "fp8, one scale": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
}


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", THEIRS)
def test_folders_of_the_package_are_read_to_its_own_values(case, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.manual_seed(0)
    told = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(told).to(getattr(torch, dtype))
    group = {"targets": ["Linear"], **THEIRS[case]}
    apply_quantization_config(theirs, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(torch.rand_like(module.weight_scale) * 0.01 + 0.002)
            if getattr(module, "weight_zero_point", None) is not None and not THEIRS[case]["weights"].get(
                "symmetric", True
            ):
                module.weight_zero_point.data.copy_(torch.randint_like(module.weight_zero_point, -100, 100))
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.config.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    save_file({name: x.contiguous() for name, x in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    compressor.decompress_model(theirs)
    found = load(tmp_path, ONE)
    assert bool(found.numerics.activations) == ("input_activations" in group)
    params = jax.jit(materialize)(found.params)
    for i in range(2):
        attn, mlp = theirs.model.layers[i].self_attn, theirs.model.layers[i].mlp
        for name in ("up", "gate", "down"):
            want = getattr(mlp, f"{name}_proj").weight.detach()
            got = params["blocks"]["mlp"][name][i]
            assert got.dtype == dtype
            np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), want.float().numpy().T, err_msg=name)
        for name in "qkv":
            want = getattr(attn, f"{name}_proj").weight.detach().float().numpy().T
            got = np.asarray(params["blocks"]["attn"][f"w{name}"][i].astype(jnp.float32))
            np.testing.assert_array_equal(got.reshape(want.shape), want, err_msg=name)
        want = attn.o_proj.weight.detach().float().numpy().T
        np.testing.assert_array_equal(
            np.asarray(params["blocks"]["attn"]["wo"][i].astype(jnp.float32)).reshape(want.shape), want
        )
