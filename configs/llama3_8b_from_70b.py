r"""Llama-3-8B trained on with Llama-3-70B as its teacher, whose weights lie packed in 8 bits: 2,000 steps.

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama3_8b_from_70b.py --topology v5p:2x4x4
    60.9 of 95.7 GiB a chip; 47.7 k tokens/s (26.7 k to 69.6 k), MFU 17%, HFU 68%; 12 h 13 min, 391 chip-hours
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama3_8b_from_70b.py

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama3_8b_from_70b.py --topology v6e:4x4 --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out
    17.6 of 31.2 GiB a chip; 44.6 k tokens/s (18.4 k to 68.4 k), MFU 16%, HFU 65%; 1 h 38 min, 26 chip-hours
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama3_8b_from_70b.py -- \
    --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama3_8b_from_70b.py --topology v5e:4x4 --mesh.fsdp 16 --train.batch 16 --train.remat full --data.sequence 2048
    13.0 of 15.8 GiB a chip; 10.6 k tokens/s (3.48 k to 15.8 k), MFU 16%, HFU 67%; 1 h 43 min, 28 chip-hours
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama3_8b_from_70b.py -- \
    --mesh.fsdp 16 --train.batch 16 --train.remat full --data.sequence 2048

The steps are the same everywhere, so the tokens are not: 2.1 billion, 0.26 billion and 66 million. MFU counts the student's FLOPs
alone, HFU the teacher's, too.

In float32 the teacher alone would take 16.4 GiB of each of 16 chips, in bfloat16 8.2: beside the student's state and the step neither fits a v5e with its
15.75 GiB, and int8 does (4.1 GiB). It is packed while it is read, one parameter at a time, so that no chip ever holds it whole in float32.

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: less than the teacher's size suggests. Peng et al. 2024 (https://arxiv.org/abs/2410.16215) found that learning from logits in pre-training helps
larger students more, and that a larger teacher is not always a better one. The control is llama3_8b_continued.py with the same steps: the
same text without a teacher.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another.
`models/llama3-8b` and `models/llama3-70b` are the folders of Hugging Face's meta-llama/Meta-Llama-3-8B and meta-llama/Meta-Llama-3-70B (config.json,
tokenizer.json, .safetensors), whose licence you accept there, on the same file system; both have one tokenizer. Where a folder is not, `lmeff plan` goes by
the shape below, and `lmeff run` refuses.
"""

from lmeff.config import (
    Claim,
    DataConfig,
    Distill,
    EvaluateConfig,
    Experiment,
    MeshPlan,
    OptimConfig,
    Quantize,
    Stage,
    TrainConfig,
    preset,
)

FOLDER, TEACHER = "models/llama3-8b", "models/llama3-70b"
INT8 = (("blocks/(attn/w[qkvo]|mlp/(up|gate|down))|embed/table|head/w", "int8"), (".*", None))


def experiment() -> Experiment:
    """The teacher, packed; the student as it is; the student as the teacher makes it."""
    small, large = (preset(name, context=8192) for name in ("llama3_8b", "llama3_70b"))
    return Experiment(
        name="llama3-8b-from-70b",
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer=FOLDER, sequence=8192),
        mesh=MeshPlan(fsdp=32),
        train=TrainConfig(batch=128, steps=2000, remat="save:attn_out,mlp.up", checkpoint_every=500, eval_every=500),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=100),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(
            Stage(name="teacher", load=TEACHER, model=large, compress=(Quantize(rules=INT8),), steps=0, export=True),
            Stage(name="before", load=FOLDER, model=small, steps=0),
            Stage(name="student", load=FOLDER, model=small, distill=Distill(teacher="teacher", mix=0.9)),
        ),
        claims=(Claim(artifact="student", of="before"),),
    )
