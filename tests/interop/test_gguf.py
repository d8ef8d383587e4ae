"""GGUF files: read back with the package's own reader and compared number by number with the leaves; run by transformers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import dequantize, is_qtensor, pair, parse_format, quantize
from lmeff.core.tree import flatten, merge, unflatten
from lmeff.interop.gguf import export, pack_blocks
from lmeff.interop.gguf_architectures import architecture_of, rope_factors
from lmeff.models.config import ModelConfig, MoE, RopeScaling
from lmeff.models.transformer import param_specs

gguf = pytest.importorskip("gguf")

LLAMA = ModelConfig(vocab=96, width=64, layers=2, heads=4, kv_heads=2, ffn=96, tied=False, context=512, rope_theta=5e5)
GEMMA2 = dataclasses.replace(
    LLAMA, norm_plus_one=True, norm_at="both", activation="geglu", tied=True, window=16, full_layers=(1,), logit_softcap=30.0, attention_softcap=50.0,
    attention_scale=16**-0.5, embed_scale=8.0,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "llama with biases": dataclasses.replace(LLAMA, bias="attention", tied=True),
    "qwen2": dataclasses.replace(LLAMA, bias="qkv"),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="head", head_width=32, tied=True),
    "gemma2": GEMMA2,
}
NAMES = {"llama with biases": "llama"}
each_config = pytest.mark.parametrize("case", CONFIGS)


def random_of(cfg):
    """Every leaf random, norms and biases too."""
    random = np.random.default_rng(1)
    specs = flatten(param_specs(cfg))
    offset = {"ones": 1.0, "zeros": 0.0, "normal": 0.0}
    return unflatten(
        {
            path: offset[s.init] + random.normal(size=s.shape).astype(np.float32) * np.float32(0.05)
            for path, s in specs.items()
        }
    )


@functools.cache
def random_params(case):
    return random_of(CONFIGS[case])


def written(tmp_path, cfg, params, **options):
    rows = export(cfg, params, tmp_path / "m.gguf", **options)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    return rows, {t.name: t for t in reader.tensors}, {name: f.contents() for name, f in reader.fields.items()}


def values(tensor):
    """[out, in], as the package reads them."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


def expected(case, cfg):
    """Every tensor by hand: the leaf's letters written out, pairs of channels one by one."""
    p = {path: np.asarray(x) for path, x in flatten(random_params(case)).items()}
    width, heads, inner = cfg.width, cfg.heads, cfg.head_size
    lift = 1 if cfg.norm_plus_one else 0

    def turned(rows, count):
        if NAMES.get(case, case) != "llama":
            return rows
        order = [
            h * inner + (i // 2 if i % 2 == 0 else inner // 2 + i // 2) for h in range(count) for i in range(inner)
        ]
        return rows[order]

    found = {"token_embd.weight": p["embed/table"], "output_norm.weight": p["final_norm/scale"] + lift}
    if not cfg.tied:
        found["output.weight"] = p["head/w"].T
    for i in range(cfg.layers):
        a, m = {k.removeprefix("blocks/attn/"): x[i] for k, x in p.items() if "/attn/" in k}, "blocks/mlp/"
        found |= {
            f"blk.{i}.attn_norm.weight": p["blocks/attn_norm/scale"][i] + lift,
            f"blk.{i}.ffn_norm.weight": p["blocks/mlp_norm/scale"][i] + lift,
            f"blk.{i}.attn_q.weight": turned(a["wq"].reshape(width, -1).T, heads),
            f"blk.{i}.attn_k.weight": turned(a["wk"].reshape(width, -1).T, cfg.kv_heads),
            f"blk.{i}.attn_v.weight": a["wv"].reshape(width, -1).T,
            f"blk.{i}.attn_output.weight": a["wo"].reshape(-1, width).T,
            f"blk.{i}.ffn_up.weight": p[m + "up"][i].T,
            f"blk.{i}.ffn_gate.weight": p[m + "gate"][i].T,
            f"blk.{i}.ffn_down.weight": p[m + "down"][i].T,
        }
        if cfg.norm_at == "both":
            found[f"blk.{i}.post_attention_norm.weight"] = p["blocks/attn_post_norm/scale"][i] + 1
            found[f"blk.{i}.post_ffw_norm.weight"] = p["blocks/mlp_post_norm/scale"][i] + 1
        if cfg.qk_norm:
            found |= {f"blk.{i}.attn_{x}_norm.weight": a[f"{x}_norm"] for x in "qk"}
        if "q_bias" in a:
            found |= {
                f"blk.{i}.attn_q.bias": turned(a["q_bias"].reshape(-1), heads),
                f"blk.{i}.attn_v.bias": a["v_bias"].reshape(-1),
            }
            found[f"blk.{i}.attn_k.bias"] = turned(a["k_bias"].reshape(-1), cfg.kv_heads)
        if "o_bias" in a:
            found[f"blk.{i}.attn_output.bias"] = a["o_bias"]
    return found


@each_config
def test_every_number_is_where_llama_cpp_wants_it(case, tmp_path):
    cfg = CONFIGS[case]
    rows, tensors, _ = written(tmp_path, cfg, random_params(case), kind="F32")
    want = expected(case, cfg)
    assert tensors.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(values(tensors[name]), x, err_msg=name)
    assert {row.how for row in rows} == {"as it was"}
    assert [*tmp_path.iterdir()] == [tmp_path / "m.gguf"]


@each_config
def test_metadata(case, tmp_path):
    cfg, name = CONFIGS[case], NAMES.get(case, case)
    _, _, fields = written(tmp_path, cfg, random_params(case), kind="Q8_0", name="a name")
    head = 32 if case == "qwen3" else 16
    want = {
        "general.architecture": name, "general.type": "model", "general.name": "a name", "general.file_type": 7, "general.quantization_version": 2,
        f"{name}.vocab_size": 96, f"{name}.context_length": 512, f"{name}.embedding_length": 64, f"{name}.block_count": 2,
        f"{name}.feed_forward_length": 96, f"{name}.attention.head_count": 4, f"{name}.attention.head_count_kv": 2, f"{name}.attention.key_length": head,
        f"{name}.attention.value_length": head, f"{name}.rope.dimension_count": head, f"{name}.rope.freq_base": 5e5,
        f"{name}.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    if case == "gemma2":
        want |= {
            "gemma2.attention.sliding_window": 16,
            "gemma2.attn_logit_softcapping": 50.0,
            "gemma2.final_logit_softcapping": 30.0,
        }
    assert {key: value for key, value in fields.items() if not key.startswith("GGUF.")} == want


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_values_are_within_half_a_step(kind, tmp_path):
    rows, tensors, _ = written(tmp_path, LLAMA, random_params("llama"), kind=kind)
    for name, x in expected("llama", LLAMA).items():
        tensor = tensors[name]
        wanted = (
            "F32" if "norm" in name else "Q8_0" if kind == "Q4_0" and name.startswith(("token", "output")) else kind
        )
        assert tensor.tensor_type.name == wanted, name
        error = np.abs(values(tensor) - x)
        if wanted.startswith("Q"):
            largest = np.abs(x.reshape(-1, 32)).max(1, keepdims=True)
            # Q8_0: half a step of 1/127, and a scale in float16. Q4_0: a step of 1/8, since of both ends only one has the code 8.
            bound = largest * (0.5 / 127 + 2.0**-11 if wanted == "Q8_0" else 1 / 8 + 2.0**-11)
            assert (error.reshape(-1, 32) <= bound).all()
            assert error.max() > 0.3 * bound.max()
        else:
            assert (error <= np.abs(x) * {"F32": 0, "F16": 2.0**-11, "BF16": 2.0**-8}[wanted] + 2.0**-25).all()
    assert {row.kind for row in rows} == {"F32", kind} | ({"Q8_0"} if kind == "Q4_0" else set())


@functools.cache
def packed(case, text):
    """Matrices of the blocks quantized along what contracts them."""
    specs, format = flatten(param_specs(CONFIGS[case])), parse_format(text)
    chosen = {
        path: x
        for path, x in flatten(random_params(case)).items()
        if path.startswith(("blocks/attn", "blocks/mlp")) and specs[path].is_matmul
    }

    @jax.jit
    def pack(leaves):
        tensor = format.granularity == "tensor"
        return {
            path: quantize(x, format, specs[path].own_axes if tensor else specs[path].axes)
            for path, x in leaves.items()
        }

    return merge(random_params(case), unflatten(pack(chosen)))


@jax.jit
def written_values(leaf, half):
    """Of a packed leaf; `half`: with scales in float16."""
    scale = jnp.where(half, leaf.scale.astype(jnp.float16).astype(jnp.float32), leaf.scale)
    return dequantize(dataclasses.replace(leaf, scale=scale))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("int4/g32", {"Q4_0"}),
        ("int4", {"Q4_0"}),
        ("int3/g64", {"Q4_0"}),
        ("int8/g32", {"Q8_0"}),
        ("int8", {"Q8_0"}),
        ("int6/tensor", {"Q8_0"}),
        ("int8/g16", {"F16"}),
        ("int4-affine/g32", {"F16"}),
        ("fp8", {"F16"}),
    ],
)
def test_codes_are_kept_where_a_block_can_hold_them(text, kinds, tmp_path):
    """Of qwen3 here heads are 32 wide, so that groups of the output matrix lie in blocks; scales alone are rounded, to float16."""
    params = packed("qwen3", text)
    rows, tensors, _ = written(tmp_path, CONFIGS["qwen3"], params, kind="F16")
    leaves = flatten(params)
    chosen = {row.path: row for row in rows if is_qtensor(leaves[row.path])}
    assert {row.kind for row in chosen.values()} == kinds
    for path, row in chosen.items():
        leaf = leaves[path]
        name = {
            "wq": "attn_q",
            "wk": "attn_k",
            "wv": "attn_v",
            "wo": "attn_output",
            "up": "ffn_up",
            "gate": "ffn_gate",
            "down": "ffn_down",
        }[path.split("/")[-1]]
        got = np.stack([values(tensors[f"blk.{i}.{name}.weight"]) for i in range(2)])
        kept = row.how.startswith("codes")
        want = np.asarray(written_values(leaf, kept))
        inner = 32 if path.endswith("wo") else 1  # letters that contract it lie first, but for heads
        want = want.reshape(2, 64 if not path.endswith(("wo", "down")) else want.shape[1] * inner, -1).swapaxes(1, 2)
        if kept:
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_array_equal(got, want.astype(np.float16).astype(np.float32))
            assert row.how == f"values of {text} rounded to F16"


def test_rows_of_interleaved_heads_take_their_codes_and_scales_along(tmp_path):
    """llama: what is written is the turned matrix of the values, with or without codes."""
    params = packed("llama", "int4")
    _, tensors, _ = written(tmp_path, LLAMA, params, kind="F32")
    leaf = flatten(params)["blocks/attn/wk"]
    rows = np.asarray(written_values(leaf, True)).reshape(2, 64, 32).swapaxes(1, 2)
    order = [h * 16 + (i // 2 if i % 2 == 0 else 8 + i // 2) for h in range(2) for i in range(16)]
    np.testing.assert_array_equal(values(tensors["blk.1.attn_k.weight"]), rows[1][order])


def test_codes_that_lie_two_a_byte_are_written_like_any(tmp_path):
    params = packed("qwen3", "int4/g32")
    paired = jax.tree.map(lambda x: pair(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)
    export(CONFIGS["qwen3"], params, tmp_path / "one.gguf", kind="F32")
    export(CONFIGS["qwen3"], paired, tmp_path / "two.gguf", kind="F32")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_blocks_are_those_of_the_package():
    """A block whose scale and codes are known: the package's own rounding of its values gives the same bytes."""
    random = np.random.default_rng(2)
    scale = np.repeat(2.0 ** random.integers(-9, 0, (3, 2)), 32, axis=1).astype(np.float32)
    for kind, low, high in (("Q8_0", -127, 128), ("Q4_0", -8, 8)):
        codes = random.integers(low, high, (3, 64))
        codes[:, ::32] = low  # the end that fixes the scale
        want = gguf.quants.quantize((codes * scale).astype(np.float32), gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(pack_blocks(codes, scale, kind), want)


def test_rows_that_are_no_blocks_stay_in_half_precision(tmp_path):
    cfg = dataclasses.replace(LLAMA, ffn=40)
    params = random_of(cfg)
    rows, tensors, _ = written(tmp_path, cfg, params, kind="Q4_0")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert next(row.how for row in rows if row.path == "blocks/mlp/down") == "rounded to F16"


REFUSED = {
    "experts": (dataclasses.replace(LLAMA, moe=MoE(experts=4)), r"llama, which expects model.moe = None and not MoE"),
    "a window": (dataclasses.replace(LLAMA, window=8), "model.window = None and not 8"),
    "layer norm": (dataclasses.replace(LLAMA, norm="layer"), "model.norm = rms and not layer"),
    "every layer full": (dataclasses.replace(GEMMA2, full_layers=()), r"gemma2, which expects model.full_layers = \(1,\) and not \(\)"),
    "another scale": (dataclasses.replace(GEMMA2, attention_scale=0.3), "model.attention_scale = None or 0.25 and not 0.3"),
    "longrope": (
        dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="longrope", original=64, short=(1.0,) * 8, long=(2.0,) * 8)),
        "rope_scaling of the kind linear, llama3, or yarn",
    ),
    "yarn of other constants": (dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original=64, beta_fast=16)), "usual constants"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(case):
    cfg, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        architecture_of(cfg)


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    with pytest.raises(ConfigError, match="got the type 'Q5_K'"):
        export(LLAMA, random_params("llama"), tmp_path / "m.gguf", kind="Q5_K")
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        export(LLAMA, random_params("llama"), tmp_path / "taken" / "m.gguf")
    missing = {**random_params("llama"), "head": {}}
    with pytest.raises(ConfigError, match="got the leaf 'head/w'"):
        export(LLAMA, missing, tmp_path / "m.gguf")
    assert [*tmp_path.iterdir()] == [tmp_path / "taken"]


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_longer_contexts(kind, tmp_path):
    scaling = RopeScaling(kind=kind, factor=8.0, original=64)
    cfg = dataclasses.replace(LLAMA, rope_scaling=scaling)
    _, tensors, fields = written(tmp_path, cfg, random_params("llama"), kind="F16")
    if kind == "llama3":
        np.testing.assert_array_equal(values(tensors["rope_freqs.weight"]), rope_factors(cfg))
        assert "llama.rope.scaling.type" not in fields
        return
    assert fields["llama.rope.scaling.type"] == kind
    assert fields["llama.rope.scaling.factor"] == 8.0
    assert fields["llama.rope.scaling.original_context_length"] == 64


def test_llama3_divides_long_waves_and_leaves_short_ones():
    """Meta's rule, wave by wave: original / 4 and shorter stay, original and longer are divided, between is blended."""
    cfg = dataclasses.replace(
        LLAMA, head_width=64, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original=256, low=1.0, high=4.0)
    )
    factors = rope_factors(cfg)
    for i, factor in enumerate(factors):
        wave = 2 * np.pi * 5e5 ** (i / 32)
        smooth = (256 / wave - 1) / 3
        want = 1.0 if wave < 64 else 8.0 if wave > 256 else 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(want, rel=1e-5)
    assert {1.0, 8.0} < {*factors.tolist()}


def byte_level(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the hat that the cat ate"] * 4, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return tokenizer


def test_a_byte_level_tokenizer(tmp_path):
    tokenizer = byte_level(tmp_path)
    size = tokenizer.get_vocab_size()
    cfg = dataclasses.replace(CONFIGS["qwen2"], vocab=size + 3)
    params = random_of(cfg)
    _, _, fields = written(tmp_path, cfg, params, tokenizer=tmp_path)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    kinds = dict(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|end|>"], kinds["<tool>"], kinds["the"]) == (
        gguf.TokenType.CONTROL,
        gguf.TokenType.USER_DEFINED,
        gguf.TokenType.NORMAL,
    )
    assert kinds[f"[PAD{size}]"] == gguf.TokenType.UNUSED
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("<|end|>")


def test_a_sentencepiece_tokenizer(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = ["the cat sat on the mat", "that hat is the hat of the cat", "a mat is a mat"]
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type="bpe", byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    cfg = dataclasses.replace(LLAMA, vocab=model.vocab_size() + 2)
    params = random_of(cfg)
    _, _, fields = written(tmp_path, cfg, params, tokenizer=tmp_path)
    count = model.vocab_size()
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"][:count] == [model.IdToPiece(i) for i in range(count)]
    assert fields["tokenizer.ggml.scores"][:count] == pytest.approx([model.GetScore(i) for i in range(count)])
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert kinds[3] == gguf.TokenType.BYTE


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="got no tokenizer that GGUF knows"):
        export(LLAMA, random_params("llama"), tmp_path / "m.gguf", tokenizer=tmp_path)
    byte_level(tmp_path)
    with pytest.raises(ConfigError, match="name the one it was made with"):
        export(LLAMA, random_params("llama"), tmp_path / "m.gguf", tokenizer=tmp_path)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, expected at most model.vocab = 96"):
        export(LLAMA, random_params("llama"), tmp_path / "m.gguf", tokenizer=tmp_path, pretokenizer="llama-bpe")
    assert not (tmp_path / "m.gguf").exists()


HF = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
    ),
}


# What transformers (5.24) does not read from such a file and takes to be as in the published models.
UNREAD = {"qwen3": {"head_dim": 32}, "gemma2": {"query_pre_attn_scalar": 16}}


@pytest.mark.oracle
@pytest.mark.parametrize("case", HF)
def test_transformers_reads_the_same_model(case, tmp_path):
    """A random model of transformers, its weights as leaves, a file of them: transformers reads it back to the same logits."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, more = HF[case]
    cfg = CONFIGS[case]
    config = getattr(transformers, kind)(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=cfg.tied, pad_token_id=None, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for x in model.parameters():
            x += torch.randn_like(x) * 0.05
    state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    export(cfg, leaves_of(case, state, cfg), tmp_path / "m.gguf", kind="F32")
    read = pytest.importorskip(
        "transformers.modeling_gguf_pytorch_utils"
    ).load_gguf_checkpoint  # what `from_pretrained` calls; that also wants accelerate
    told = transformers.AutoConfig.for_model(**read(tmp_path / "m.gguf")["config"] | UNREAD.get(case, {}))
    loaded = transformers.AutoModelForCausalLM.from_config(told).eval().float()
    tensors = read(tmp_path / "m.gguf", return_tensors=True, model_to_load=loaded)["tensors"]
    missing, unknown = loaded.load_state_dict(tensors, strict=False)
    assert (missing, unknown) == (["lm_head.weight"] if cfg.tied else [], [])
    ids = torch.arange(48).reshape(2, 24) * 5 % 96
    with torch.no_grad():
        got, want = loaded(ids).logits, model(ids).logits
    np.testing.assert_allclose(got, want, atol=2e-4 * float(want.abs().max()))


def leaves_of(case, state, cfg):
    def stack(name, shape=(-1,)):
        rows = [state[f"model.layers.{i}.{name}"] for i in range(2)]
        return np.stack([x.T.reshape(shape) if x.ndim == 2 else x.reshape(shape) for x in rows])

    width, inner = cfg.width, cfg.head_size
    attn = {
        "wo": np.stack(
            [state[f"model.layers.{i}.self_attn.o_proj.weight"].T.reshape(cfg.heads, inner, width) for i in range(2)]
        )
    }
    for x, count in (("q", cfg.heads), ("k", cfg.kv_heads), ("v", cfg.kv_heads)):
        attn[f"w{x}"] = stack(f"self_attn.{x}_proj.weight", (width, count, inner))
        if case == "qwen2":
            attn[f"{x}_bias"] = stack(f"self_attn.{x}_proj.bias", (count, inner))
    if case == "qwen3":
        attn |= {f"{x}_norm": stack(f"self_attn.{x}_norm.weight") for x in "qk"}
    mlp = {
        x: stack(f"mlp.{x}_proj.weight", (width, -1) if x != "down" else (-1, width)) for x in ("up", "gate", "down")
    }
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if case == "gemma2":
        norms = {
            "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }  # fmt: skip
    blocks = {"attn": attn, "mlp": mlp, **{own: {"scale": stack(f"{name}.weight")} for own, name in norms.items()}}
    tree = {
        "embed": {"table": state["model.embed_tokens.weight"]},
        "blocks": blocks,
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    return tree if cfg.tied else {**tree, "head": {"w": state["lm_head.weight"].T}}
