r"""Llama-3-8B trained on with text of your own: 4,000 steps from the published weights.

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama3_8b_continued.py --topology v5p:2x4x4
    52.7 of 95.7 GiB a chip; 159 k tokens/s (89.2 k to 240 k), MFU 56%; 7 h 21 min, 235 chip-hours
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama3_8b_continued.py

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama3_8b_continued.py --topology v6e:4x4 --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out
    19.1 of 31.2 GiB a chip; 133 k tokens/s (65.6 k to 226 k), MFU 46%; 2 h 12 min, 35 chip-hours
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama3_8b_continued.py -- \
    --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama3_8b_continued.py --topology v5e:4x4 --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096
    10.7 of 15.8 GiB a chip; 33.3 k tokens/s (14.3 k to 52.5 k), MFU 51%; 2 h 11 min, 35 chip-hours
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama3_8b_continued.py -- \
    --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096

The steps are the same everywhere, so the tokens are not: 4.2 billion, 1.05 billion and 0.26 billion.

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: a lower loss on text like yours than before, and a higher one on everything else; the report has both models on your held-out documents. Warming
up and decaying the learning rate again, and keeping some general text in the mixture (`data.mixture`), are what helps (Ibrahim et al. 2024,
https://arxiv.org/abs/2403.08763).

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another.
`models/llama3-8b` is the folder of Hugging Face's meta-llama/Meta-Llama-3-8B (config.json, tokenizer.json, .safetensors), whose licence you accept there, on
the same file system; its tokenizer is used. Where the folder is not, `lmeff plan` goes by the shape below, and `lmeff run` refuses.
"""

from lmeff.config import (
    Claim,
    DataConfig,
    EvaluateConfig,
    Experiment,
    MeshPlan,
    OptimConfig,
    Stage,
    TrainConfig,
    preset,
)

FOLDER = "models/llama3-8b"
LLAMA = preset("llama3_8b", context=8192)


def experiment() -> Experiment:
    """The model as it is, and as your text makes it."""
    return Experiment(
        name="llama3-8b-continued",
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer=FOLDER, sequence=8192),
        mesh=MeshPlan(fsdp=32),
        train=TrainConfig(batch=128, steps=4000, remat="save:attn_out,mlp.up", checkpoint_every=500, eval_every=500),
        optim=OptimConfig(learning_rate=3e-5, warmup_steps=200),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(
            Stage(name="before", load=FOLDER, model=LLAMA, steps=0),
            Stage(name="model", load=FOLDER, model=LLAMA),
        ),
        claims=(Claim(artifact="model", of="before"),),
    )
