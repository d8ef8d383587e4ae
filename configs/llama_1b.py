"""A Llama of 1.2 billion parameters from scratch on 16 TPU v5e chips: 25 billion tokens, 20 a parameter.

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama_1b.py --topology v5e:4x4
    PLAN
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama_1b.py

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama_1b.py --topology v6e:4x4
    PLAN
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama_1b.py

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama_1b.py --topology v5p:2x4x4 --mesh.fsdp 32
    PLAN
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama_1b.py -- --mesh.fsdp 32

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: the law of Hoffmann et al. 2022 as Besiroglu et al. 2024 fit it (https://arxiv.org/abs/2404.10102) gives 2.48 nats/token for so many parameters
and tokens, on the text and the tokenizer of its authors. Another text has another loss: compare runs with each other.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another. The
tokenizer is made from its first megabytes, with as many ids as Llama's, and nothing is downloaded. The shape is near that of Llama 3.2 1B. Learning rate
and batch as GPT-3's model of 1.3 billion (Brown et al. 2020, https://arxiv.org/abs/2005.14165, table 2.1).
"""

from lmeff.config import DataConfig, EvaluateConfig, Experiment, MeshPlan, OptimConfig, Stage, TrainConfig, preset

ROWS, SEQUENCE = 256, 4096


def experiment() -> Experiment:
    """One stage: a million tokens a step, cut over 16 chips."""
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
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=500),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(Stage(name="model"),),
    )
