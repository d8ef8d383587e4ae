"""llama2.c's files against an oracle of its own forward pass (neighbouring rotary pairs, float64)."""

import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.batch import Batch
from lmeff.core.errors import CheckpointError
from lmeff.core.numerics import QTensor, dequantize, is_qtensor
from lmeff.core.tree import flatten
from lmeff.interop.llama2c import load, read_file
from lmeff.models.transformer import forward, project
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import layout_ops

D, F, L, H, K, V, CONTEXT = 32, 48, 3, 4, 2, 40, 16
C = D // H
MATRICES = {
    "wq": (H * C, D),
    "wk": (K * C, D),
    "wv": (K * C, D),
    "wo": (D, H * C),
    "w1": (F, D),
    "w2": (D, F),
    "w3": (F, D),
}
ONE = make_layout(MeshPlan(), jax.devices()[:1])


def weights(tied: bool) -> dict[str, np.ndarray]:
    """Random float32 weights by llama2.c's names, layers stacked."""
    rng = np.random.default_rng(3)
    found = {name: rng.standard_normal((L, *shape)) / 5 for name, shape in MATRICES.items()}
    found |= {name: 1 + rng.standard_normal((L, D)) / 5 for name in ("attention_norm", "ffn_norm")}
    found |= {"norm": 1 + rng.standard_normal(D) / 5, "tok_embeddings": rng.standard_normal((V, D))}
    if not tied:
        found["output"] = rng.standard_normal((V, D)) / 3
    return {name: x.astype(np.float32) for name, x in found.items()}


def grouped(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Q8_0: codes and scales of runs of the flattened numbers."""
    runs = x.reshape(-1, group)
    scales = np.abs(runs).max(1) / np.float32(127)
    return np.round(runs / scales[:, None]).astype(np.int8), scales


def put_file(path: Path, version: int, w: dict[str, np.ndarray], group: int = 8) -> Path:
    """A model file as export.py lays it out."""
    tied, numbers = "output" not in w, (D, F, L, H, K, V, CONTEXT)
    with path.open("wb") as file:
        if version == 0:
            file.write(struct.pack("<7i", *numbers[:5], V if tied else -V, CONTEXT))
            order = ("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm")
            for name in order:
                file.write(w[name].tobytes())
            file.write(np.full((2, CONTEXT, C // 2), 7, np.float32).tobytes())
            file.write(b"" if tied else w["output"].tobytes())
            return path
        file.write(
            struct.pack("<I8iB", 0x616B3432, version, *numbers, tied) + struct.pack("<i", group)[: 4 * (version == 2)]
        )
        file.write(bytes(256 - file.tell()))
        for name in ("attention_norm", "ffn_norm", "norm"):
            file.write(w[name].tobytes())
        for name in ("tok_embeddings", *MATRICES, *(() if tied else ("output",))):
            for matrix in w[name] if name in MATRICES else [w[name]]:
                for part in grouped(matrix, group) if version == 2 else [matrix]:
                    file.write(part.tobytes())
    return path


def rounded(w: dict[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """The weights that version 2 stands for."""

    def one(x):
        codes, scales = grouped(x, group)
        return (codes * scales[:, None]).astype(np.float32).reshape(x.shape)

    return {name: x if "norm" in name else one(x) for name, x in w.items()}


def oracle(w: dict[str, np.ndarray], tokens_T: np.ndarray) -> np.ndarray:
    """Logits [T, V] as run.c computes them, in float64: a position at a time, rotary pairs (2i, 2i + 1)."""
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def rms(x, scale):
        return x / np.sqrt((x * x).mean() + 1e-5) * scale

    def rotate(x, position):
        out = x.copy()
        for i in range(0, C, 2):
            angle = position * 10000.0 ** (-i / C)
            out[:, i] = x[:, i] * np.cos(angle) - x[:, i + 1] * np.sin(angle)
            out[:, i + 1] = x[:, i] * np.sin(angle) + x[:, i + 1] * np.cos(angle)
        return out

    keys, values = np.zeros((L, len(tokens_T), K, C)), np.zeros((L, len(tokens_T), K, C))
    logits = []
    for position, token in enumerate(tokens_T):
        x = w["tok_embeddings"][token]
        for layer in range(L):
            h = rms(x, w["attention_norm"][layer])
            q = rotate((w["wq"][layer] @ h).reshape(H, C), position)
            keys[layer, position] = rotate((w["wk"][layer] @ h).reshape(K, C), position)
            values[layer, position] = (w["wv"][layer] @ h).reshape(K, C)
            heads = []
            for head in range(H):
                own = head // (H // K)
                scores = keys[layer, : position + 1, own] @ q[head] / np.sqrt(C)
                p = np.exp(scores - scores.max())
                heads.append(p / p.sum() @ values[layer, : position + 1, own])
            x = x + w["wo"][layer] @ np.concatenate(heads)
            h = rms(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        logits.append(w.get("output", w["tok_embeddings"]) @ rms(x, w["norm"]))
    return np.stack(logits)


def logits_of(cfg, params, tokens_T: np.ndarray) -> np.ndarray:
    """The model's own."""
    tokens = jnp.asarray(tokens_T)[None]
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, ones, jnp.arange(tokens.shape[1])[None], ones.astype(jnp.float32))
    make = layout_ops(ONE)
    out = forward(params, batch, cfg, make_ops=make)
    return np.asarray(project(out.hidden_BTD, out.head, cfg, make(None).ops))[0]


TOKENS = np.random.default_rng(5).integers(0, V, 12)


class TestModel:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("version", [0, 1, 2])
    def test_computes_what_llama2c_computes(self, tmp_path, version, tied):
        w = weights(tied)
        cfg, params = load(put_file(tmp_path / "m.bin", version, w), ONE, jnp.float32)
        assert (cfg.width, cfg.ffn, cfg.layers, cfg.heads, cfg.kv_heads, cfg.vocab) == (D, F, L, H, K, V)
        assert (cfg.context, cfg.tied, cfg.norm_eps, cfg.bias) == (CONTEXT, tied, 1e-5, "none")
        expected = oracle(rounded(w, 8) if version == 2 else w, TOKENS)
        np.testing.assert_allclose(logits_of(cfg, params, TOKENS), expected, atol=2e-4)

    def test_neighbouring_pairs_would_be_noticed(self, tmp_path):
        """The oracle tells whether queries and keys were put in the order of this model's rotary pairs."""
        w = weights(True)
        cfg, params = load(put_file(tmp_path / "m.bin", 0, w), ONE, jnp.float32)
        order = jnp.asarray([i // 2 + (i % 2) * (C // 2) for i in range(C)])
        attn = params["blocks"]["attn"]
        attn |= {"wq": attn["wq"][..., order], "wk": attn["wk"][..., order]}
        assert np.abs(logits_of(cfg, params, TOKENS) - oracle(w, TOKENS)).max() > 0.1

    @pytest.mark.parametrize("version", [0, 2])
    @pytest.mark.parametrize(
        "plan",
        [MeshPlan(data=4, tensor=2), MeshPlan(fsdp=8), MeshPlan(fsdp=4, tensor=2)],
        ids=["data x tensor", "fsdp", "both"],
    )
    def test_a_mesh_holds_the_same_numbers(self, tmp_path, plan, version):
        file = put_file(tmp_path / "m.bin", version, weights(False), group=64)
        whole, cut = (load(file, layout, jnp.bfloat16)[1] for layout in (ONE, make_layout(plan)))
        for path, leaf in flatten(cut).items():
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(whole)[path]))
        assert not cut["blocks"]["mlp"]["up"].is_fully_replicated

    def test_groups_may_run_over_the_ends_of_rows(self, tmp_path):
        w = weights(False)
        _, params = load(put_file(tmp_path / "m.bin", 2, w, group=64), ONE, jnp.float32)
        expected = rounded(w, 64)
        np.testing.assert_array_equal(params["embed"]["table"], expected["tok_embeddings"])
        np.testing.assert_array_equal(params["blocks"]["mlp"]["down"], expected["w2"].transpose(0, 2, 1))

    @pytest.mark.parametrize("plan", [None, MeshPlan(fsdp=4, tensor=2)], ids=["one device", "mesh"])
    def test_packed_codes_and_scales_are_the_same_numbers(self, tmp_path, plan):
        file = put_file(tmp_path / "m.bin", 2, weights(False))
        layout = ONE if plan is None else make_layout(plan)
        cfg, packed = load(file, layout, jnp.float32, packed=True)
        floats = flatten(load(file, layout, jnp.float32)[1])
        for path, leaf in flatten(packed).items():
            assert is_qtensor(leaf) == ("norm" not in path)
            value = dequantize(leaf) if isinstance(leaf, QTensor) else leaf
            np.testing.assert_array_equal(np.asarray(value), np.asarray(floats[path]))
        if plan is None:
            np.testing.assert_allclose(
                logits_of(cfg, packed, TOKENS), oracle(rounded(weights(False), 8), TOKENS), atol=2e-4
            )

    @pytest.mark.parametrize(
        ("version", "group", "words"),
        [(1, 8, "expected version 2"), (2, 64, "a divisor of dim"), (2, 16, "the width of a head")],
        ids=["floats", "over rows", "over heads"],
    )
    def test_what_cannot_stay_packed_says_why(self, tmp_path, version, group, words):
        with pytest.raises(CheckpointError, match=words):
            load(put_file(tmp_path / "m.bin", version, weights(True), group), ONE, jnp.float32, packed=True)


def changed(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


class TestDamagedModel:
    @pytest.mark.parametrize(
        ("version", "damage", "words"),
        [
            (0, lambda b: b[:-4], "bytes, expected"),
            (0, lambda b: b + bytes(4), "bytes, expected"),
            (1, lambda b: b[:-4], "bytes, expected"),
            (2, lambda b: b + b"x", "bytes, expected"),
            (1, lambda b: b[:100], "a header of 256"),
            (0, lambda b: b[:20], "seven whole numbers"),
            (0, lambda b: b"", "seven whole numbers"),
            (0, lambda b: changed(b, 8, struct.pack("<i", -3)), "sizes from 1"),
            (0, lambda b: changed(b, 8, struct.pack("<i", 2**30)), "sizes from 1"),
            (0, lambda b: changed(b, 12, struct.pack("<i", 5)), "n_heads divides"),
            (0, lambda b: changed(b, 16, struct.pack("<i", 3)), "kv_heads"),
            (0, lambda b: changed(b, 8, struct.pack("<i", L + 1)), "'n_layers': 4"),
            (1, lambda b: changed(b, 4, struct.pack("<i", 3)), "version 3, expected 0, 1 or 2"),
            (1, lambda b: changed(b, 36, b"\x07"), "shared_classifier 7"),
            (2, lambda b: changed(b, 37, struct.pack("<i", 0)), "group size 0"),
            (2, lambda b: changed(b, 37, struct.pack("<i", 7)), "groups of 7"),
            (0, lambda b: b"PK\x03\x04" + b, "pickles"),
            (0, lambda b: b"<!DOCTYPE html>" + b, "web page"),
        ],
        ids=[
            *("cut off", "bytes behind", "version 1 cut off", "version 2 with bytes behind", "header cut off"),
            *("no header", "empty", "negative size", "huge size", "heads", "key-value heads", "another layer"),
            *("version", "flag", "group of none", "group that divides nothing", "pickle", "web page"),
        ],
    )
    def test_is_refused_in_one_paragraph(self, tmp_path, version, damage, words):
        file = put_file(tmp_path / "m.bin", version, weights(True))
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(CheckpointError, match=words) as caught:
            read_file(file)
        message = str(caught.value)
        assert str(file) in message
        assert ": got " in message
        assert ", expected " in message
        assert "\n" not in message

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError, match="No such file"):
            read_file(tmp_path / "absent.bin")
