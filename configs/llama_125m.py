r"""A Llama of 124 million parameters from scratch on one host of 4 TPU v5e chips: 2.5 billion tokens, 20 a parameter.

v5e-4 (v5litepod-4: 4 chips, 2x2, one host)
lmeff plan configs/llama_125m.py --topology v5e:2x2
    12.4 of 15.8 GiB a chip; 406 k tokens/s (236 k to 753 k), MFU 44%; 1 h 43 min, 7 chip-hours
tpu_scripts/launch.sh --type v5litepod-4 --topology v5e:2x2 --runs /mnt/runs configs/llama_125m.py

v6e-1 (1 chip)
lmeff plan configs/llama_125m.py --topology v6e:1x1 --mesh.fsdp 1 --train.accumulate 4
    14.1 of 31.2 GiB a chip; 354 k tokens/s (215 k to 709 k), MFU 33%; 1 h 58 min, 2 chip-hours
tpu_scripts/launch.sh --type v6e-1 --topology v6e:1x1 --runs /mnt/runs configs/llama_125m.py -- --mesh.fsdp 1 --train.accumulate 4

A rehearsal without a TPU: the same stages and files, of a model that is too small to learn, in four processes of one machine.
lmeff run configs/llama_125m.py --name rehearsal --processes 4 --model.layers 2 --model.width 64 --model.heads 4 --model.kv-heads 4 --model.ffn 128 \
    --data.sequence 64 --train.batch 16 --train.steps 20 --optim.warmup-steps 2

Nothing of this has been measured on a TPU: the numbers are the plan's, tokens a second with the range in which they may lie.

To expect: the law of Hoffmann et al. 2022 as Besiroglu et al. 2024 fit it (https://arxiv.org/abs/2404.10102) gives 3.32 nats/token for so many parameters
and tokens, on the text and the tokenizer of its authors. Another text has another loss: compare runs with each other.

Yours to provide: text. `corpus/` is a folder of JSON lines with a field "text", on a file system that every host sees; `--data.path` names another. The
tokenizer is made from its first megabytes, and nothing is downloaded. Learning rate and batch as GPT-3's smallest model (Brown et al. 2020,
https://arxiv.org/abs/2005.14165, table 2.1), whose shape it nearly has.
"""

from lmeff.config import DataConfig, EvaluateConfig, Experiment, MeshPlan, OptimConfig, Stage, TrainConfig, preset

ROWS, SEQUENCE = 256, 2048


def experiment() -> Experiment:
    """One stage: half a million tokens a step, cut over four chips."""
    return Experiment(
        name="llama-125m",
        model=preset("125m"),
        precision="params=float32,compute=bfloat16,output=float32,state=float32",
        data=DataConfig(source="jsonl", path=("corpus/",), tokenizer="bpe", bpe_vocab=50_304, sequence=SEQUENCE),
        mesh=MeshPlan(fsdp=4),
        train=TrainConfig(
            batch=ROWS,
            steps=2_500_000_000 // (ROWS * SEQUENCE),
            remat="save:attn_out",
            checkpoint_every=500,
            eval_every=500,
        ),
        optim=OptimConfig(learning_rate=6e-4, warmup_steps=700),
        evaluate=EvaluateConfig(batch=64, batches=16),
        recipe=(Stage(name="model"),),
    )
