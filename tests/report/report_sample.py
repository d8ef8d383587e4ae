"""A realistic report of a small demo: eight artifacts, document losses drawn so that intervals and paired differences are real bootstraps."""

import math

import numpy as np

from lmeff.report.compare import at_most, compare
from lmeff.report.schema import ArtifactRow, Report, RuleRow
from lmeff.report.statistics import INTERVAL, bootstrap_mean

DOCUMENTS = 400
BYTES_PER_TOKEN = 3.62
# name: kind, parents, loss, parameters, share kept, bits, FLOPs, ms, train tokens, seconds, loss at the start of its curve
ARTIFACTS = {
    "teacher": ("dense", (), 2.402, 3_411_200, 1.0, 32, 5_914_624, 0.0412, 16_384_000, 1312.0, 8.3),
    "pruned-50": ("pruned", ("teacher",), 2.441, 3_411_200, 0.54, 32, 5_914_624, 0.0415, 4_096_000, 351.0, 2.9),
    "shrunk": ("shrunk", ("teacher",), 3.117, 1_842_944, 1.0, 32, 3_011_584, 0.0243, 0, 0.0, None),
    "shrunk-recovered": (
        "distilled",
        ("shrunk", "teacher"),
        2.498,
        1_842_944,
        1.0,
        32,
        3_011_584,
        0.0240,
        4_096_000,
        402.0,
        3.3,
    ),
    "student": ("distilled", ("teacher",), 2.687, 1_102_080, 1.0, 32, 1_671_168, 0.0149, 8_192_000, 611.0, 8.2),
    "control": ("dense", (), 2.731, 1_102_080, 1.0, 32, 1_671_168, 0.0151, 8_192_000, 288.0, 8.3),
    "qat-int8": ("packed", ("teacher",), 2.405, 3_411_200, 1.0, 8, 5_914_624, 0.0387, 2_048_000, 214.0, 2.44),
    "shrunk-qat-int4": (
        "composed",
        ("shrunk-recovered", "teacher"),
        2.561,
        1_842_944,
        1.0,
        4.5,
        3_011_584,
        0.0262,
        4_096_000,
        447.0,
        2.9,
    ),
}


def document_losses(seed=7):
    """`{name: (nats, tokens)}`: documents differ in length and difficulty; artifacts share the difficulty."""
    rng = np.random.default_rng(seed)
    tokens = rng.geometric(1 / 180, DOCUMENTS).astype(float)
    difficulty = rng.normal(0, 0.32, DOCUMENTS)
    losses = {}
    for name, entry in ARTIFACTS.items():
        own = rng.normal(0, 0.06, DOCUMENTS)
        losses[name] = ((entry[2] + difficulty + own) * tokens, tokens)
    return losses


def curve(entry, rng):
    """A noisy training curve from its start to about the final loss."""
    final, tokens, start = entry[2], entry[8], entry[10]
    if not tokens:
        return ()
    steps = np.arange(1, 201)
    decay = (steps / 200) ** -0.55 - 1
    values = final + (start - final) * decay / decay[0] + rng.normal(0, 0.03, 200)
    return tuple((float(10 * s), float(tokens * s // 200), float(v)) for s, v in zip(steps, values))


RULES = {
    "embed/table": ("VD", (4096, 192)),
    "blocks/attn/wq": ("LDHC", (6, 192, 6, 32)),
    "blocks/attn/wk": ("LDKC", (6, 192, 2, 32)),
    "blocks/attn/wv": ("LDKC", (6, 192, 2, 32)),
    "blocks/attn/wo": ("LHCD", (6, 6, 32, 192)),
    "blocks/attn_norm/scale": ("LD", (6, 192)),
    "blocks/mlp/w_up": ("LDF", (6, 192, 512)),
    "blocks/mlp/w_down": ("LFD", (6, 512, 192)),
    "final_norm/scale": ("D", (192,)),
}


def artifact(name, losses, rng):
    kind, parents, _, parameters, kept, bits, flops, ms, tokens, seconds, _ = ARTIFACTS[name]
    mean, low, high = bootstrap_mean(*losses[name], samples=500)
    packed = {"packed": "int8", "composed": "int4/g32", "pruned": "density 0.5"}.get(kind)
    return ArtifactRow(
        name=name,
        kind=kind,
        parents=parents,
        loss=mean,
        loss_interval=(low, high),
        bits_per_byte=mean / math.log(2) / BYTES_PER_TOKEN,
        parameters=parameters,
        nonzero_parameters=round(parameters * kept),
        stored_bytes=round(parameters * bits / 8) + 6_144,
        effective_bits=bits + 8 * 6_144 / parameters,
        flops_per_token=flops,
        ms_per_token=ms,
        ms_interval=(ms * 0.97, ms * 1.06),
        train_tokens=tokens,
        train_seconds=seconds,
        curve=curve(ARTIFACTS[name], rng),
        rules=tuple(
            RuleRow(path=p, letters=l, shape=s, rule="none" if packed is None or "norm" in p else packed)
            for p, (l, s) in RULES.items()
        )
        if kind != "dense"
        else (),
        note="magnitude, cubic schedule" if kind == "pruned" else "",
    )


def make_report(**changes):
    losses, rng = document_losses(), np.random.default_rng(3)
    rows = {name: artifact(name, losses, rng) for name in ARTIFACTS}
    student = compare("student", losses["student"], "control", losses["control"], samples=500)
    slower = rows["shrunk-qat-int4"].ms_per_token / rows["shrunk-recovered"].ms_per_token
    gap = rows["qat-int8"].loss / rows["teacher"].loss - 1
    fields = {
        "name": "tinystories-demo",
        "created": "2026-03-04T05:06:07+00:00",
        "artifacts": tuple(rows.values()),
        "comparisons": (student, compare("qat-int8", losses["qat-int8"], "teacher", losses["teacher"], samples=500)),
        "verdicts": (
            at_most("int8 export within 0.5% of its teacher", gap, 0.005, "loss ratio - 1"),
            at_most("the distilled student beats its control", student.interval[1], 0.0, "upper end of the interval"),
            at_most(
                "int4 composition is faster than the model it was made from", slower, 1.0, "ms/token over ms/token"
            ),
        ),
        "conventions": {
            "FLOPs": "forward pass, per token: 2 FLOPs per weight of every matrix product, plus causal attention; masked weights count as dense.",
            "storage": "bytes of every leaf as stored: codes, scales, zero points and the float leaves; masks stored dense.",
            "timing": "median over repeats of one scoring forward pass divided by its tokens, artifacts in turn; quartiles. On this machine only.",
            "interval": INTERVAL,
        },
        "environment": {
            "jax": "0.10.2",
            "python": "3.11.7",
            "devices": "8 x cpu",
            "cores": 2,
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        },
        "config": {
            "model": {
                "layers": {"value": 6, "origin": "configs/demo.py"},
                "heads": {"value": 6, "origin": "configs/demo.py"},
                "window": {"value": None, "origin": "default"},
            },
            "optim": {
                "name": {"value": "adamw", "origin": "default"},
                "lr": {"value": 0.002, "origin": "--optim.lr"},
            },
            "mesh": {"axes": {"value": {"data": 2, "fsdp": 2, "tensor": 2}, "origin": "configs/demo.py"}},
            "seed": {"value": 0, "origin": "default"},
        },
        "data": "TinyStories validation text, byte-pair vocabulary of 4,096",
        "held_out_tokens": int(losses["teacher"][1].sum()),
        "held_out_documents": DOCUMENTS,
    }
    return Report(**(fields | changes))
