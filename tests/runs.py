"""A small run that the tests of the command line and of recipes share: text, a config file, and the command line in this process."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from lmeff.cli import main
from tests import hurry

CONFIG = """
from lmeff.config import (
    Activations, Claim, DataConfig, Distill, EvaluateConfig, Experiment, ModelConfig, OptimConfig, Prune, Quantize, ShrinkConfig, Stage, TrainConfig,
)

MODEL = ModelConfig(vocab=264, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
STUDENT = ModelConfig(vocab=264, width=32, layers=1, heads=2, kv_heads=1, ffn=32)


def experiment():
    return Experiment(
        name="small",
        runs={runs!r},
        model=MODEL,
        data=DataConfig(path=({text!r},), sequence=32, validation=0.2, test=0.2),
        train=TrainConfig(batch=8, steps=4, log_every=1, checkpoint_every=2),
        optim=OptimConfig(warmup_steps=1),
        evaluate=EvaluateConfig(batch=32, batches=4, repeats=1, samples=50),
        recipe=({recipe}),
        claims=({claims}),
    )
"""
RECIPE = """
            Stage(name="teacher"),
            Stage(name="student", model=STUDENT, distill=Distill(teacher="teacher"), steps=2),
            Stage(name="shrunk", start="teacher", shrink=ShrinkConfig(ffn=32, kv_heads=1, layers=1, calibration_batches=1), steps=0),
            Stage(
                name="composed",
                start="teacher",
                compress=(Prune(sparsity=0.5, end=2), Quantize(method="lsq")),
                activations=Activations(rules=(("mlp.down", "int8/tensor"), (".*", "int8")), batches=1),
                distill=Distill(teacher="teacher"),
                steps=3,
            ),
            Stage(name="packed", start="composed", steps=0, export=True),
"""
CLAIMS = """Claim(artifact="packed", of="composed", within=0.5, bytes_at_most=0.5), Claim(artifact="student", of="teacher", within=1.0)"""


def write_text(folder: Path) -> Path:
    """Documents with some structure, enough for three splits."""
    words = (
        "the",
        "loss",
        "of",
        "a",
        "small",
        "model",
        "falls",
        "when",
        "it",
        "reads",
        "more",
        "text",
        "than",
        "before",
    )
    place = folder / "text"
    place.mkdir()
    for i in range(120):
        lines = (" ".join(words[(i * 7 + j * 3 + k * k) % len(words)] for k in range(9)) for j in range(4))
        (place / f"{i:03}.txt").write_text(f"document {i}\n" + "\n".join(lines))
    return place


def write_config(
    folder: Path, text: Path, *, recipe: str = RECIPE, claims: str = CLAIMS, name: str = "small.py"
) -> Path:
    """The config as a file."""
    file = folder / name
    file.write_text(
        CONFIG.format(runs=str(folder / "runs"), text=str(text), recipe=recipe, claims=claims + ("," if claims else ""))
    )
    return file


def lmeff(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def lmeff_json(*arguments: object) -> dict:
    """The JSON object of a command that succeeds."""
    code, out, err = lmeff(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def start(config: Path, name: str, *options: object) -> subprocess.Popen[str]:
    """The command line in a process of its own, on one device."""
    environment = {**os.environ, **hurry.ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lmeff.cli", "run", str(config), "--name", name, "--json", *map(str, options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict:
    """Its JSON object, once it has succeeded."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out)
