r"""Llama-3-8B from scratch: 160 billion tokens, 20 a parameter.

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama3_8b.py --topology v5p:2x4x4
    52.7 of 95.7 GiB a chip; 159 k tokens/s (89.2 k to 240 k), MFU 56%; 11 d 16 h, 8,967 chip-hours
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama3_8b.py

v5p-128 (128 TensorCores: 64 chips, 4x4x4)
lmeff plan configs/llama3_8b.py --topology v5p:4x4x4 --mesh.fsdp 64 --train.batch 256 --train.steps 76293
    50.8 of 95.7 GiB a chip; 314 k tokens/s (177 k to 480 k), MFU 55%; 5 d 21 h, 9,052 chip-hours
tpu_scripts/launch.sh --type v5p-128 --topology v5p:4x4x4 --runs /mnt/runs configs/llama3_8b.py -- \
    --mesh.fsdp 64 --train.batch 256 --train.steps 76293

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama3_8b.py --topology v6e:4x4 --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out --train.steps 610351
    19.1 of 31.2 GiB a chip; 133 k tokens/s (65.6 k to 226 k), MFU 46%; 13 d 23 h, 5,362 chip-hours
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama3_8b.py -- \
    --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out --train.steps 610351

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama3_8b.py --topology v5e:4x4 --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096 --train.steps 2441406
    10.7 of 15.8 GiB a chip; 33.3 k tokens/s (14.3 k to 52.5 k), MFU 51%; 55 d 14 h, 21,349 chip-hours
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama3_8b.py -- \
    --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096 --train.steps 2441406

The last two are here to be compared: 16 chips are for models that are trained already (llama3_8b_continued.py).

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: the law of Hoffmann et al. 2022 as Besiroglu et al. 2024 fit it (https://arxiv.org/abs/2404.10102) gives 2.16 nats/token for so many parameters
and tokens, on the text and the tokenizer of its authors. Another text has another loss: compare runs with each other. Llama 3 itself saw 15 trillion.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another. The
tokenizer is made from its first megabytes, with as many ids as Llama's, and nothing is downloaded. Hoffmann et al. 2022
(https://arxiv.org/abs/2203.15556) for the tokens; Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783, table 3) for the shape and the learning rate.
"""

from lmeff.config import DataConfig, EvaluateConfig, Experiment, MeshPlan, OptimConfig, Stage, TrainConfig, preset

ROWS, SEQUENCE = 128, 8192


def experiment() -> Experiment:
    """One stage: every chip holds a 32nd of the state and four rows."""
    return Experiment(
        name="llama3-8b",
        model=preset("llama3_8b"),
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer="bpe", bpe_vocab=128_256, sequence=SEQUENCE),
        mesh=MeshPlan(fsdp=32),
        train=TrainConfig(
            batch=ROWS,
            steps=160_000_000_000 // (ROWS * SEQUENCE),
            remat="save:attn_out,mlp.up",
            checkpoint_every=500,
            eval_every=2000,
        ),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(Stage(name="model"),),
    )
