"""The command that times inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from lmeff.bench.measure import Shape, bench
from lmeff.bench.show import print_result
from lmeff.bench.variants import make_variants, random_model
from lmeff.commands.words import refuse_unknown
from lmeff.core.precision import parse
from lmeff.infer.served import Served
from lmeff.launch import Machine
from lmeff.models.config import PRESETS, preset
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.recipe.open import open_model

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Times decoding or prefill of a model in several formats, in turn, beside the bandwidth of this machine's memory.

    Attributes:
        kind: decode writes tokens after a prompt one at a time, prefill reads prompts.
        model: the folder of a run, a model folder, a Hugging Face folder, or the name of a preset, which gets random weights.
        formats: WEIGHTS[+table][@CACHE], such as f32, int8, int4/g32+table or bf16@int8; the first is what others are compared with.
        artifact: of a run, by name; the last that is done where none is named.
        batch: rows at a time.
        context: tokens of each prompt.
        tokens: that a turn decodes.
        turns: of each format.
        precision: dtypes by role, such as compute=bfloat16.
        mesh: how many devices cut what.
        machine: what it runs on.
        json: print one JSON object on stdout and the table on stderr.
    """

    kind: tyro.conf.Positional[Literal["decode", "prefill"]]
    model: tyro.conf.Positional[str]
    formats: tuple[str, ...] = ("f32", "int8")
    artifact: str | None = None
    batch: int = 1
    context: int = 128
    tokens: int = 32
    turns: int = 7
    precision: str | None = None
    mesh: MeshPlan = MeshPlan()  # noqa: RUF009 -- frozen
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def time_inference(command: Bench, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff bench`."""
    refuse_unknown(overrides, "bench")
    shape = Shape(batch=command.batch, context=command.context, tokens=command.tokens, turns=command.turns)
    served, source = model_of(command)
    result = bench(command.kind, make_variants(served, command.formats), shape)
    console.print(f"model: {source}", highlight=False, soft_wrap=True)
    print_result(result, console)
    return {"model": source, **result.to_json()}


def model_of(command: Bench) -> tuple[Served, str]:
    """A preset with random weights, or the model at a place."""
    if command.model in PRESETS and not Path(command.model).exists():
        policy = parse(command.precision or "")
        served = random_model(preset(command.model), make_layout(command.mesh), policy)
        return served, f"{command.model}, random weights"
    opened = open_model(Path(command.model), artifact=command.artifact, mesh=command.mesh, precision=command.precision)
    return opened.served, opened.source
