"""A Llama of 1.2 billion parameters from scratch on 16 TPU v5e chips: 25 billion tokens, 20 a parameter.

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama_1b.py --topology v5e:4x4
    11.0 of 15.8 GiB a chip; 189 k tokens/s (106 k to 314 k), MFU 49%; 36 h 41 min, 587 chip-hours
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama_1b.py

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama_1b.py --topology v6e:4x4
    11.0 of 31.2 GiB a chip; 741 k tokens/s (407 k to 1449 k), MFU 41%; 9 h 22 min, 150 chip-hours
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama_1b.py

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama_1b.py --topology v5p:2x4x4 --mesh.fsdp 32
    5.63 of 95.7 GiB a chip; 912 k tokens/s (508 k to 1463 k), MFU 51%; 7 h 37 min, 244 chip-hours
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama_1b.py -- --mesh.fsdp 32

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: the law of Hoffmann et al. 2022 as Besiroglu et al. 2024 fit it (https://arxiv.org/abs/2404.10102) gives 2.48 nats/token for so many parameters
and tokens, on the text and the tokenizer of its authors. Another text has another loss: compare runs with each other.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another. The
tokenizer is made from its first megabytes, with as many ids as Llama's, and nothing is downloaded. The shape is near that of Llama 3.2 1B. Learning rate as
that of Pythia's model of a billion (Biderman et al. 2023, https://arxiv.org/abs/2304.01373).
"""

from lmeff.config import DataConfig, EvaluateConfig, Experiment, MeshPlan, OptimConfig, Stage, TrainConfig, preset

ROWS, SEQUENCE = 128, 4096


def experiment() -> Experiment:
    """One stage: half a million tokens a step, cut over 16 chips."""
    return Experiment(
        name="llama-1b",
        model=preset("1b"),
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer="bpe", bpe_vocab=128_256, sequence=SEQUENCE),
        mesh=MeshPlan(fsdp=16),
        train=TrainConfig(
            batch=ROWS,
            steps=25_000_000_000 // (ROWS * SEQUENCE),
            remat="save:attn_out",
            checkpoint_every=500,
            eval_every=1000,
        ),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=1000),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(Stage(name="model"),),
    )
