"""Llama-3-70B from scratch on 512 TPU v5p chips: 1.4 trillion tokens, 20 a parameter.

v5p-1024 (1,024 TensorCores: 512 chips, 8x8x8)
lmeff plan configs/llama3_70b.py --topology v5p:8x8x8
    30.3 of 95.7 GiB a chip; 284 k tokens/s (151 k to 416 k), MFU 54%; 57 d 3 h, 701,942 chip-hours
tpu_scripts/launch.sh --type v5p-1024 --topology v5p:8x8x8 --runs /mnt/runs configs/llama3_70b.py

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: the law of Hoffmann et al. 2022 as Besiroglu et al. 2024 fit it (https://arxiv.org/abs/2404.10102) gives 1.97 nats/token for so many parameters
and tokens, on the text and the tokenizer of its authors. Another text has another loss: compare runs with each other.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another. The
tokenizer is made from its first megabytes, with as many ids as Llama's, and nothing is downloaded. Hoffmann et al. 2022
(https://arxiv.org/abs/2203.15556) for the tokens; Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783, table 3) for the shape and the learning rate.
"""

from lmeff.config import DataConfig, EvaluateConfig, Experiment, MeshPlan, OptimConfig, Stage, TrainConfig, preset

ROWS, SEQUENCE = 512, 8192


def experiment() -> Experiment:
    """One stage: every chip holds a 512th of the state and one row."""
    return Experiment(
        name="llama3-70b",
        model=preset("llama3_70b"),
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer="bpe", bpe_vocab=128_256, sequence=SEQUENCE),
        mesh=MeshPlan(fsdp=512),
        train=TrainConfig(
            batch=ROWS,
            steps=1_400_000_000_000 // (ROWS * SEQUENCE),
            remat="save:attn_out",
            checkpoint_every=200,
            eval_every=2000,
        ),
        optim=OptimConfig(learning_rate=1.5e-4, warmup_steps=2000),
        evaluate=EvaluateConfig(batch=512, batches=4),
        recipe=(Stage(name="model"),),
    )
