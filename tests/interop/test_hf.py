"""Folders of every family without transformers: where values lie, round trips byte for byte, and what is refused in which words."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import QFormat, quantize
from lmeff.core.tree import flatten, map_with_path
from lmeff.interop.config_json import config_of, keys_of
from lmeff.interop.families import FAMILIES
from lmeff.interop.hf import details, export, load, located, read_config
from lmeff.interop.stored import pieces, stored_shape
from lmeff.interop.tensors import open_tensors, write_tensors
from lmeff.models.config import ModelConfig, MoE, RopeScaling
from lmeff.parallel.mesh import MeshPlan, make_layout
from tests.interop.hf_cases import CASES, EXPERTS, GPT2, SIZES

LAYOUT = make_layout(MeshPlan(), jax.devices()[:1])
LLAMA = {"model_type": "llama", **SIZES, "tie_word_embeddings": False}


def shapes_of(keys):
    """The stored tensors by the family's own table; that it is the right one is for transformers to say."""
    family = FAMILIES[keys["model_type"]]
    cfg = config_of(family, keys, "case")
    found = pieces(
        {p: (spec.letters, s) for p, (spec, s) in located(family, cfg, family.prefixes[0]).items()}, cfg.sizes
    )
    return {name: stored_shape(parts[0].stored, cfg.sizes) for name, parts in found.items()}


def values_of(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def make_folder(folder, keys, values):
    write_tensors(folder, values, values.__getitem__)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture
def llama(tmp_path):
    """A folder, and a way to write one that differs."""
    values = values_of(shapes_of(LLAMA))

    def make(keys=LLAMA, **changes):
        kept = {name: value for name, value in {**values, **changes}.items() if value is not None}
        return make_folder(tmp_path / "llama", keys, kept)

    return make, values


# ---- values


def test_leaves_are_the_stored_matrices_turned_to_their_letters(llama):
    make, values = llama
    cfg, params = load(make(), LAYOUT)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    for i in range(cfg.layers):
        q, k = (values[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qk")
        o, gate = values[f"model.layers.{i}.self_attn.o_proj.weight"], values[f"model.layers.{i}.mlp.gate_proj.weight"]
        for h in range(4):
            np.testing.assert_array_equal(flat["blocks/attn/wq"][i, :, h], q[8 * h : 8 * h + 8].T)
            np.testing.assert_array_equal(flat["blocks/attn/wo"][i, h], o[:, 8 * h : 8 * h + 8].T)
        for h in range(2):
            np.testing.assert_array_equal(flat["blocks/attn/wk"][i, :, h], k[8 * h : 8 * h + 8].T)
        np.testing.assert_array_equal(flat["blocks/mlp/gate"][i], gate.T)
    np.testing.assert_array_equal(flat["embed/table"], values["model.embed_tokens.weight"])
    np.testing.assert_array_equal(flat["head/w"], values["lm_head.weight"].T)


def test_fused_projections_are_taken_apart(tmp_path):
    keys = {"model_type": "phi3", **SIZES}
    values = values_of(
        {
            "model.embed_tokens.weight": (61, 32),
            "model.norm.weight": (32,),
            "lm_head.weight": (61, 32),
            **{
                f"model.layers.{i}.{name}.weight": shape
                for i in range(2)
                for name, shape in {
                    "input_layernorm": (32,),
                    "post_attention_layernorm": (32,),
                    "self_attn.qkv_proj": (64, 32),
                    "self_attn.o_proj": (32, 32),
                    "mlp.gate_up_proj": (80, 32),
                    "mlp.down_proj": (32, 40),
                }.items()
            },
        }
    )
    _, params = load(make_folder(tmp_path / "phi3", keys, values), LAYOUT)
    fused, up = (values[f"model.layers.1.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    np.testing.assert_array_equal(np.asarray(attn["wq"][1]).reshape(32, 32), fused[:32].T)
    np.testing.assert_array_equal(np.asarray(attn["wk"][1]).reshape(32, 16), fused[32:48].T)
    np.testing.assert_array_equal(np.asarray(attn["wv"][1]).reshape(32, 16), fused[48:].T)
    np.testing.assert_array_equal(mlp["gate"][1], up[:40].T)
    np.testing.assert_array_equal(mlp["up"][1], up[40:].T)


@pytest.mark.parametrize("body", ["", "transformer."], ids=["as published", "as transformers saves"])
def test_gpt2_is_not_transposed_and_its_masks_are_no_weights(tmp_path, body):
    values = values_of(
        {
            "wte.weight": (61, 24),
            "wpe.weight": (32, 24),
            "ln_f.weight": (24,),
            "ln_f.bias": (24,),
            **{
                f"h.{i}.{name}": shape
                for i in range(2)
                for name, shape in {
                    **{f"ln_{n}.{part}": (24,) for n in (1, 2) for part in ("weight", "bias")},
                    "attn.c_attn.weight": (24, 72),
                    "attn.c_attn.bias": (72,),
                    "attn.c_proj.weight": (24, 24),
                    "attn.c_proj.bias": (24,),
                    "mlp.c_fc.weight": (24, 96),
                    "mlp.c_fc.bias": (96,),
                    "mlp.c_proj.weight": (96, 24),
                    "mlp.c_proj.bias": (24,),
                    "attn.bias": (1, 1, 32, 32),
                }.items()
            },
        }
    )
    folder = make_folder(tmp_path / "gpt2", {"model_type": "gpt2", **GPT2}, {body + n: x for n, x in values.items()})
    _, params = load(folder, LAYOUT)
    fused, attn = values["h.1.attn.c_attn.weight"], params["blocks"]["attn"]
    np.testing.assert_array_equal(np.asarray(attn["wk"][1]).reshape(24, 24), fused[:, 24:48])
    np.testing.assert_array_equal(np.asarray(attn["v_bias"][1]).reshape(24), values["h.1.attn.c_attn.bias"][48:])
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"][1], values["h.1.mlp.c_fc.weight"])
    np.testing.assert_array_equal(params["embed"]["positions"], values["wpe.weight"])


def test_experts_are_stacked(tmp_path):
    keys = {"model_type": "mixtral", **SIZES, **EXPERTS, "num_local_experts": 3}
    values = values_of(shapes_of(keys))
    _, params = load(make_folder(tmp_path / "mixtral", keys, values), LAYOUT)
    for name, stored in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        for e in range(3):
            expected = values[f"model.layers.1.block_sparse_moe.experts.{e}.{stored}.weight"].T
            np.testing.assert_array_equal(params["blocks"]["moe"][name][1, e], expected)
    router = values["model.layers.0.block_sparse_moe.gate.weight"].T
    np.testing.assert_array_equal(params["blocks"]["moe"]["router"][0], router)


# ---- round trips


@pytest.mark.parametrize("case", CASES)
def test_every_family_comes_back_byte_for_byte(case, tmp_path):
    keys = CASES[case]
    values = values_of(shapes_of(keys), ml_dtypes.bfloat16)
    folder = make_folder(tmp_path / "in", {**keys, "eos_token_id": 7}, values)
    cfg, params = load(folder, LAYOUT)
    about = details(folder)
    assert about == {"family": keys["model_type"], "keep": {"eos_token_id": 7}}
    export(cfg, params, tmp_path / "out", family=about["family"], keep=about["keep"])
    back = open_tensors(tmp_path / "out")
    assert set(back) == set(values)
    for name, value in values.items():
        assert back.read(name).tobytes() == value.tobytes(), name
    assert read_config(tmp_path / "out") == cfg
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert written["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("case", "plan", "parts"),
    [
        ("llama, grouped, untied", MeshPlan(fsdp=2, tensor=2), 4),
        ("mistral, window", MeshPlan(pipe=2, fsdp=2, tensor=2), 8),
        ("phi3", MeshPlan(fsdp=2, tensor=2), 4),
        ("qwen3_moe", MeshPlan(fsdp=2, tensor=2, expert=2), 4),
        ("gpt2", MeshPlan(fsdp=2, tensor=2), 4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mesh_holds_what_one_device_holds_and_writes_it_alike(case, plan, parts, tmp_path):
    keys = {**CASES[case], "vocab_size": 64, **({"n_head": 4} if case == "gpt2" else {})}
    values = values_of(shapes_of(keys))
    folder = make_folder(tmp_path / "in", keys, values)
    cfg, alone = load(folder, LAYOUT)
    _, cut = load(folder, make_layout(plan))
    for path, leaf in flatten(cut).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(alone)[path]), err_msg=path)
    wq = flatten(cut)["blocks/attn/wq"]
    assert len(wq.sharding.device_set) == 8
    assert wq.addressable_shards[0].data.size * parts == wq.size
    export(cfg, cut, tmp_path / "out", family=keys["model_type"])
    back = open_tensors(tmp_path / "out")
    for name, value in values.items():
        np.testing.assert_array_equal(back.read(name), value, err_msg=name)


def test_dtypes_are_cast_in_and_out(llama, tmp_path):
    make, values = llama
    cfg, params = load(make(), LAYOUT, jnp.bfloat16)
    assert {leaf.dtype for leaf in flatten(params).values()} == {jnp.dtype("bfloat16")}
    export(cfg, params, tmp_path / "out", dtype=jnp.float32, shard_bytes=9000)
    back = open_tensors(tmp_path / "out")
    for name, value in values.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back.read(name), value.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_tokenizer_files_are_copied_and_nothing_else_is(llama, tmp_path):
    make, _ = llama
    folder = make()
    cfg, params = load(folder, LAYOUT)
    (tmp_path / "tokenizer.json").write_text("{}")
    export(cfg, params, tmp_path / "out", tokenizer_files=[tmp_path / "tokenizer.json"])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(ConfigError, match=r"tokenizer_files: got .*missing\.model, expected a file that exists"):
        export(cfg, params, tmp_path / "other", tokenizer_files=[tmp_path / "missing.model"])
    with pytest.raises(ConfigError, match=r"config\.json, expected files with names of their own"):
        export(cfg, params, tmp_path / "other", tokenizer_files=[folder / "config.json"])
    assert not (tmp_path / "other").exists()


# ---- tensors that do not fit


def test_missing_and_unknown_tensors_are_listed(llama):
    make, values = llama
    gone, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    folder = make(**{gone: None, extra: values[gone], "score.weight": values["lm_head.weight"]})
    with pytest.raises(CheckpointError) as raised:
        load(folder, LAYOUT)
    assert str(raised.value) == (
        f"{folder}: got weights that do not fit config.json (model_type 'llama', 2 layers): the folder lacks {gone} and has besides {extra}, score.weight; "
        "expected each tensor of the model and no other. Check that both are of one model; nothing is loaded."
    )


def test_a_long_list_is_cut(llama):
    make, _ = llama
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\..* and 3 more; expected each tensor"):
        load(make({**LLAMA, "num_hidden_layers": 3}), LAYOUT)


def test_a_wrong_shape_is_named(llama):
    make, _ = llama
    folder = make(**{"model.layers.1.self_attn.k_proj.weight": np.zeros((32, 32), np.float32)})
    with pytest.raises(CheckpointError) as raised:
        load(folder, LAYOUT)
    assert str(raised.value) == (
        f"{folder}: model.layers.1.self_attn.k_proj.weight: got the shape [32, 32], expected [16, 32] from config.json; check that both are of one model, "
        "nothing is loaded."
    )


def test_codes_are_no_weights(llama):
    make, values = llama
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)}: got the dtype int8, expected float32, bfloat16, float16"
    ):
        load(make(**{name: values[name].astype(np.int8)}), LAYOUT)


def test_buffers_of_older_files_are_no_weights(llama):
    make, _ = llama
    load(make(**{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}), LAYOUT)


def test_a_tied_head_must_be_the_table(llama):
    make, values = llama
    tied = {**LLAMA, "tie_word_embeddings": True}
    cfg, params = load(make(tied, **{"lm_head.weight": values["model.embed_tokens.weight"]}), LAYOUT)
    assert cfg.tied
    assert "head" not in params


def test_a_tied_head_of_its_own_is_refused(llama):
    make, _ = llama
    folder = make({**LLAMA, "tie_word_embeddings": True})
    with pytest.raises(CheckpointError) as raised:
        load(folder, LAYOUT)
    assert str(raised.value) == (
        f"{folder}: lm_head.weight: got other numbers than model.embed_tokens.weight, expected the same, since config.json says tie_word_embeddings; "
        "set it to false if the head is its own, nothing is loaded."
    )


def test_an_untied_model_needs_its_head(llama):
    make, _ = llama
    with pytest.raises(CheckpointError, match=r"the folder lacks lm_head\.weight; expected"):
        load(make(**{"lm_head.weight": None}), LAYOUT)


# ---- exports that no family has words for


def arrays(cfg):
    from lmeff.core.specs import initialize
    from lmeff.models.transformer import param_specs

    return initialize(jax.random.key(0), param_specs(cfg))


SMALL = ModelConfig(vocab=32, width=16, layers=2, heads=4, kv_heads=2, ffn=24)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        (
            {"tied": False, "bias": "attention", "rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original=8)},
            "llama",
        ),
        ({"window": 4}, "mistral"),
        ({"heads": 3, "kv_heads": 3, "head_width": 4}, "mistral"),
        ({"window": 4, "bias": "qkv", "full_layers": (0,)}, "qwen2"),
        ({"qk_norm": "head"}, "qwen3"),
        ({"qk_norm": "head", "window": 4, "full_layers": (1,)}, "qwen3"),
        ({"qk_norm": "width", "norm_at": "post"}, "olmo2"),
        ({"moe": MoE(experts=4), "window": 3}, "mixtral"),
        ({"moe": MoE(experts=4, normalize=False), "qk_norm": "head"}, "qwen3_moe"),
        ({"rope_fraction": 0.5}, "phi3"),
        (
            {"kv_heads": 4, "norm": "layer", "activation": "gelu", "bias": "all", "positions": "learned", "context": 9},
            "gpt2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "plain",
)
def test_the_first_family_with_words_for_the_config_is_chosen(changes, family, tmp_path):
    cfg = dataclasses.replace(SMALL, **changes)
    params = arrays(cfg)
    assert export(cfg, params, tmp_path / "out").name == family
    again, back = load(tmp_path / "out", LAYOUT)
    assert dataclasses.replace(again, context=cfg.context, moe=None) == dataclasses.replace(cfg, moe=None)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(back)[path], leaf)


def test_what_no_family_can_say_is_told(tmp_path):
    cfg = dataclasses.replace(SMALL, moe=MoE(experts=4, shared=1, capacity=1.5))
    with pytest.raises(ConfigError) as raised:
        export(cfg, arrays(cfg), tmp_path / "out")
    assert str(raised.value) == (
        f"{tmp_path / 'out'}: no family of Hugging Face's (the nearest is 'mixtral') has words for model.moe.shared = 1 (it has 0); model.moe.capacity = 1.5 "
        "(it has None). Keep this model in lmeff's own format, or change it; nothing is written."
    )
    assert not (tmp_path / "out").exists()


def test_a_family_that_is_named_must_have_the_words(tmp_path):
    cfg = dataclasses.replace(SMALL, window=4)
    with pytest.raises(ConfigError, match=r"family 'llama' has no words for .*") as raised:
        export(cfg, arrays(cfg), tmp_path / "out", family="llama")
    assert "model.window = 4 (it has None)" in str(raised.value)
    with pytest.raises(ConfigError, match=r"family: got 'lama', expected one of llama, mistral"):
        export(cfg, arrays(cfg), tmp_path / "out", family="lama")


def test_packed_weights_are_no_plain_export(tmp_path):
    params = arrays(SMALL)

    def packed(path, leaf):
        return quantize(leaf, QFormat(), (-1,)) if path == "blocks/mlp/down" else leaf

    with pytest.raises(ConfigError, match=r"blocks/mlp/down: got QTensor, expected an array of floating numbers"):
        export(SMALL, map_with_path(packed, params), tmp_path / "out")
    shorter = map_with_path(lambda path, leaf: leaf[:31] if path == "embed/table" else leaf, params)
    with pytest.raises(ConfigError, match=r"embed/table: got the shape \[31, 16\], expected \[32, 16\] \(VD\)"):
        export(SMALL, shorter, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"params: got a tree that differs from the config's in head/w"):
        export(dataclasses.replace(SMALL, tied=False), params, tmp_path / "out")


def test_what_is_kept_must_change_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"keep: got 'rope_theta', expected keys that do not change the maths"):
        export(SMALL, arrays(SMALL), tmp_path / "out", keep={"rope_theta": 5.0})


def test_a_config_without_a_limit_is_given_one():
    assert keys_of(FAMILIES["llama"], SMALL)["max_position_embeddings"] == 2048
    stretched = dataclasses.replace(SMALL, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original=100))
    assert keys_of(FAMILIES["llama"], stretched)["max_position_embeddings"] == 400
