r"""Llama-3-8B in 4 bits: quantized as it is, and trained with quantized weights for 2,000 steps first.

v5p-64 (64 TensorCores: 32 chips, 2x4x4)
lmeff plan configs/llama3_8b_qat.py --topology v5p:2x4x4
    52.7 of 95.7 GiB a chip; 158 k tokens/s (88.6 k to 240 k), MFU 55%; 3 h 42 min, 118 chip-hours
tpu_scripts/launch.sh --type v5p-64 --runs /mnt/runs configs/llama3_8b_qat.py

v6e-16 (16 chips, 4x4)
lmeff plan configs/llama3_8b_qat.py --topology v6e:4x4 --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out
    19.1 of 31.2 GiB a chip; 127 k tokens/s (63.5 k to 226 k), MFU 45%; 1 h 9 min, 18 chip-hours
tpu_scripts/launch.sh --type v6e-16 --runs /mnt/runs configs/llama3_8b_qat.py -- \
    --mesh.fsdp 16 --train.batch 32 --train.remat save:attn_out

v5e-16 (v5litepod-16: 16 chips, 4x4)
lmeff plan configs/llama3_8b_qat.py --topology v5e:4x4 --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096
    10.7 of 15.8 GiB a chip; 30.7 k tokens/s (13.5 k to 52.5 k), MFU 47%; 1 h 11 min, 19 chip-hours
tpu_scripts/launch.sh --type v5litepod-16 --runs /mnt/runs configs/llama3_8b_qat.py -- \
    --mesh.fsdp 16 --train.batch 16 --train.remat save:attn_out --data.sequence 4096

The steps are the same everywhere, so the tokens are not: 2.1 billion, 0.52 billion and 0.13 billion.

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: of what rounding takes, training gives most back. PyTorch's authors (https://pytorch.org/blog/quantization-aware-training/) fine-tuned Llama-3-8B
for 5,000 steps on C4 with int4 weights (groups of 256) and int8 activations: 96% of the loss of accuracy on HellaSwag and 68% of the rise of word
perplexity on WikiText came back. Here groups are of 32 and activations stay in bfloat16, where less is lost to begin with. The report has the numbers on
your text.

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
    Quantize,
    Stage,
    TrainConfig,
    preset,
)

FOLDER = "models/llama3-8b"
LLAMA = preset("llama3_8b", context=8192)
INT4 = (("blocks/(attn/w[qkvo]|mlp/(up|gate|down))", "int4/g32"), ("embed/table|head/w", "int8"), (".*", None))


def experiment() -> Experiment:
    """The model as it is; in 4 bits without training; in 4 bits with training, and packed."""
    return Experiment(
        name="llama3-8b-qat",
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer=FOLDER, sequence=8192),
        mesh=MeshPlan(fsdp=32),
        train=TrainConfig(batch=128, steps=2000, remat="save:attn_out,mlp.up", checkpoint_every=500, eval_every=500),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=100),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(
            Stage(name="before", load=FOLDER, model=LLAMA, steps=0),
            Stage(name="int4", start="before", compress=(Quantize(rules=INT4),), steps=0, export=True),
            Stage(name="qat", load=FOLDER, model=LLAMA, compress=(Quantize(rules=INT4),)),
            Stage(name="packed", start="qat", steps=0, export=True),
        ),
        claims=(Claim(artifact="packed", of="int4"), Claim(artifact="packed", of="before", within=0.02)),
    )
