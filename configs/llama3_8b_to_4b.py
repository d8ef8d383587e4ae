r"""Llama-3-8B cut to 5.2 billion parameters, taught by the whole model, then taken to 4 bits with the same teacher: three compressions in a row.

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama3_8b_to_4b.py --topology v5p:2x4x4
    small: 39.3 of 95.7 GiB a chip; 163 k tokens/s (92.0 k to 247 k), MFU 38%, HFU 66%; 3 h 34 min, 114 chip-hours
    qat: 39.3 of 95.7 GiB a chip; 162 k tokens/s (91.6 k to 247 k), MFU 38%, HFU 66%; 3 h 35 min, 115 chip-hours
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama3_8b_to_4b.py

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama3_8b_to_4b.py --topology v6e:4x4 --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out
    small: 18.4 of 31.2 GiB a chip; 142 k tokens/s (71.0 k to 239 k), MFU 33%, HFU 59%; 1 h 2 min, 16 chip-hours
    qat: 18.4 of 31.2 GiB a chip; 138 k tokens/s (69.5 k to 239 k), MFU 32%, HFU 58%; 1 h 3 min, 17 chip-hours
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama3_8b_to_4b.py -- \
    --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama3_8b_to_4b.py --topology v5e:4x4 --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096
    small: 10.8 of 15.8 GiB a chip; 36.2 k tokens/s (15.9 k to 56.8 k), MFU 36%, HFU 64%; 1 h, 16 chip-hours
    qat: 10.8 of 15.8 GiB a chip; 34.3 k tokens/s (15.3 k to 56.8 k), MFU 34%, HFU 60%; 1 h 4 min, 17 chip-hours
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama3_8b_to_4b.py -- \
    --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096

Both stages take train.steps, 2,000: 2.1, 0.52 and 0.13 billion tokens each. MFU counts the student's FLOPs alone, HFU the teacher's, too.

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: a model between sizes. Sreenivas et al. 2024 (https://arxiv.org/abs/2408.11796) took Llama 3.1 8B to 4.5 billion parameters with 94 billion tokens:
MMLU from 65.3 to 60.5 where width was cut and to 58.7 where depth was, HellaSwag from 81.8 to 76.1 and 73.2. With fifty times fewer tokens expect clearly
less: loss still falls when these steps end. `--train.steps` buys more.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another.
`models/llama3-8b` is the folder of Hugging Face's meta-llama/Meta-Llama-3-8B (config.json, tokenizer.json, .safetensors), whose licence you accept there, on
the same file system; its tokenizer is used. Where the folder is not, `lmeff plan` goes by the shape below, and `lmeff run` refuses.
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
    ShrinkConfig,
    Stage,
    TrainConfig,
    preset,
)

FOLDER = "models/llama3-8b"
LLAMA = preset("llama3_8b", context=8192)
INT4 = (("blocks/(attn/w[qkvo]|mlp/(up|gate|down))", "int4/g32"), ("embed/table|head/w", "int8"), (".*", None))


def experiment() -> Experiment:
    """Half of the neurons of every layer go, those that are least active; everything after learns from the whole model."""
    learn = Distill(teacher="teacher", mix=1.0)
    return Experiment(
        name="llama3-8b-to-4b",
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer=FOLDER, sequence=8192),
        mesh=MeshPlan(fsdp=32),
        train=TrainConfig(batch=128, steps=2000, remat="save:attn_out,mlp.up", checkpoint_every=500, eval_every=500),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=100),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(
            Stage(name="teacher", load=FOLDER, model=LLAMA, steps=0),
            Stage(name="small", start="teacher", shrink=ShrinkConfig(ffn=7168), distill=learn),
            Stage(
                name="qat",
                start="small",
                compress=(Quantize(rules=INT4),),
                distill=learn,
                optim=OptimConfig(learning_rate=1e-5, warmup_steps=100),
            ),
            Stage(name="packed", start="qat", steps=0, export=True),
        ),
        claims=(Claim(artifact="packed", of="small", within=0.02),),
    )
