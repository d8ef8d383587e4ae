"""A tiny model of others: a Hugging Face folder with random weights and a tokenizer, and a recipe that begins from it."""

import json
from pathlib import Path

import jax

from lmeff.config import ModelConfig
from lmeff.core.specs import initialize
from lmeff.core.tree import map_with_path
from lmeff.data.tokenizer import train_bpe
from lmeff.interop import hf
from lmeff.models.transformer import param_specs

CFG = ModelConfig(
    vocab=304, width=32, layers=2, heads=4, kv_heads=2, ffn=48, context=64
)  # four rows more than the tokenizer has ids
RECIPE = """
            Stage(name="teacher", load={load!r}, steps=0),
            Stage(name="qat", start="teacher", compress=(Quantize(),), distill=Distill(teacher="teacher"), steps=2),
            Stage(name="packed", start="qat", steps=0, export=True),
"""


def write_huggingface(folder: Path, *, seed: int = 0, cfg: ModelConfig = CFG, scale: float | None = None) -> Path:
    """The folder, complete with tokenizer_config.json and generation_config.json. scale: standard deviation of all weights but norms; their own without."""
    params = initialize(jax.random.key(seed), param_specs(cfg))
    if scale is not None:
        params = map_with_path(
            lambda _, w, spec: w * (scale / spec.scale) if spec.init == "normal" else w, params, param_specs(cfg)
        )
    place = folder.with_name(folder.name + "-tokenizer")
    place.mkdir(parents=True)
    train_bpe(["the loss of a small model falls when it reads more text than before\n"] * 9, 300).save(
        place / "tokenizer.json"
    )
    (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eos|>"}))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    hf.export(cfg, params, folder, tokenizer_files=sorted(place.iterdir()), keep={"eos_token_id": 1})
    return folder
