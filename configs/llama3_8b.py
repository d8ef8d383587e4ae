"""Llama-3-8B from scratch on 64 TPU v5p chips: 160 billion tokens, 20 a parameter.

lmeff plan configs/llama3_8b.py --topology v5p:4x4x4                        # on a laptop, without any TPU
lmeff run configs/llama3_8b.py --distributed --runs gs://BUCKET/runs        # on every host of the slice

The plan says: 25 of a chip's 95.7 GiB; about 296 thousand tokens/s (168 to 453), MFU 52% with causal attention; 6 days, 9,600 chip-hours, 2.9 MWh. Nothing
of this has been measured on a TPU.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another. The
tokenizer is made from its first megabytes, with as many ids as Llama's, and nothing is downloaded. Hoffmann et al. 2022
(https://arxiv.org/abs/2203.15556) for the tokens; Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783, table 3) for the shape and the learning rate.
"""

from lmeff.config import DataConfig, EvaluateConfig, Experiment, MeshPlan, OptimConfig, Stage, TrainConfig, preset

ROWS, SEQUENCE = 256, 8192


def experiment() -> Experiment:
    """One stage: every chip holds a 64th of the state and four rows."""
    return Experiment(
        name="llama3-8b",
        model=preset("llama3_8b"),
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer="bpe", bpe_vocab=128_256, sequence=SEQUENCE),
        mesh=MeshPlan(fsdp=64),
        train=TrainConfig(
            batch=ROWS,
            steps=160_000_000_000 // (ROWS * SEQUENCE),
            remat="save:attn_out",
            checkpoint_every=500,
            eval_every=2000,
        ),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(Stage(name="model"),),
    )
