"""Commands that bring models in and out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from lmeff.commands.words import dtype_of, refuse_unknown
from lmeff.core.specs import count
from lmeff.interop.model_folder import TOKENIZER
from lmeff.models.transformer import param_specs
from lmeff.recipe.transfer import export_model, import_model

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Imports a model of others as a model folder, which every command takes that takes a model, and a stage's `load` too.

    Neither torch nor transformers is needed, and no code that lies beside the weights is run.

    Attributes:
        source: a Hugging Face folder (config.json and .safetensors), or a model file of llama2.c (.bin).
        out: the model folder to write; it must not exist.
        tokenizer: its file or folder: a tokenizer.json, a SentencePiece .model, GPT-2's vocab.json with merges.txt, a tokenizer.bin of llama2.c; what lies
            in the source's folder where none is named.
        dtype: of the parameters, such as bfloat16; as stored where none is named.
        json: print one JSON object on stdout.
    """

    source: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    tokenizer: Path | None = None
    dtype: str | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class Export:
    """Exports a model in a format that others read.

    Attributes:
        path: the folder of a run, a model folder, or a Hugging Face folder.
        out: the folder (or, for gguf, the file) to write; it must not exist.
        artifact: of a run, by name; the last that is done where none is named.
        format: hf is a Hugging Face folder that transformers opens, packed weights as the numbers they stand for; compressed-tensors is one with codes and
            scales, which vLLM reads, too; gguf-q8_0, gguf-q4_0, gguf-f16, gguf-bf16 and gguf-f32 are a file for llama.cpp, whose packed weights keep
            their codes where its blocks can.
        weights: pack the blocks' matrices on the way, such as int8 or int4/g128.
        dtype: of the weights in the files, such as bfloat16; as they are where none is named.
        pretokenizer: for gguf, llama.cpp's name for how a byte-level tokenizer cuts text, such as llama-bpe or qwen2, where the model's kind does not say.
        json: print one JSON object on stdout.
    """

    path: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    artifact: str | None = None
    format: str = "hf"
    weights: str | None = None
    dtype: str | None = None
    pretokenizer: str | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def import_one(command: Import, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff import`."""
    refuse_unknown(overrides, "import")
    jax.config.update("jax_platforms", "cpu")  # weights only pass through
    dtype = dtype_of(command.dtype)
    header = import_model(command.source, command.out, tokenizer=command.tokenizer, dtype=dtype)
    parameters = count(param_specs(header.cfg))
    files = sorted(path.removeprefix(f"{TOKENIZER}/") for path in header.files if path.startswith(f"{TOKENIZER}/"))
    told = f"tokenizer of {', '.join(files)}" if files else "no tokenizer (name it with --tokenizer)"
    console.print(
        f"{command.out}: {header.family}, {parameters:,} parameters in {header.dtype}, {told}",
        highlight=False,
        soft_wrap=True,
    )
    return {
        "model": str(command.out),
        "family": header.family,
        "parameters": parameters,
        "dtype": header.dtype,
        "tokenizer_files": files,
    }


def export_one(command: Export, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff export`."""
    refuse_unknown(overrides, "export")
    jax.config.update("jax_platforms", "cpu")  # weights only pass through
    answer = export_model(
        command.path,
        command.out,
        artifact=command.artifact,
        format=command.format,
        dtype=dtype_of(command.dtype),
        weights=command.weights,
        pretokenizer=command.pretokenizer,
    )
    told = f"{answer['source']}: written to {command.out} as {answer['format']} ({answer['family']})"
    console.print(told, highlight=False, soft_wrap=True)
    if answer["activation_formats_left_out"]:
        sites = ", ".join(answer["activation_formats_left_out"])
        console.print(f"formats of activations are not part of it: {sites}", style="yellow", highlight=False)
    return answer
