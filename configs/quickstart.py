"""A small Llama on the Python standard library's own sources, and what compression makes of it.

lmeff plan configs/quickstart.py
lmeff run configs/quickstart.py

Five minutes on two cores of a CPU, without an accelerator or a network. Its report says which of the claims below held.
"""

from lmeff.config import (
    Claim,
    DataConfig,
    Distill,
    EvaluateConfig,
    Experiment,
    ModelConfig,
    OptimConfig,
    Prune,
    Quantize,
    ShrinkConfig,
    Stage,
    TrainConfig,
)

TEACHER = ModelConfig(vocab=264, width=128, layers=4, heads=4, kv_heads=2, ffn=344)
STUDENT = ModelConfig(vocab=264, width=96, layers=2, heads=4, kv_heads=2, ffn=256)
MATRICES = "blocks/(attn/w[qkvo]|mlp/(up|gate|down))"
INT8 = ((MATRICES, "int8"), ("embed/table", "int8"), (".*", None))
INT4 = ((MATRICES, "int4"), ("embed/table", "int8"), (".*", None))


def experiment() -> Experiment:
    """Teacher, then each way of making it smaller, then all of them in one step."""
    recover = OptimConfig(learning_rate=1e-3, warmup_steps=5)
    learn = Distill(teacher="teacher", mix=1.0)
    return Experiment(
        name="quickstart",
        model=TEACHER,
        data=DataConfig(sequence=128),
        train=TrainConfig(batch=16, steps=500, log_every=10, checkpoint_every=100),
        optim=OptimConfig(learning_rate=4e-3),
        evaluate=EvaluateConfig(batch=32, batches=24),
        recipe=(
            Stage(name="teacher"),
            Stage(
                name="pruned",
                start="teacher",
                compress=(Prune(sparsity=0.5, end=30, every=5),),
                optim=recover,
                steps=60,
            ),
            Stage(name="shrunk", start="teacher", shrink=ShrinkConfig(ffn=172, kv_heads=1), steps=0),
            Stage(name="shrunk-recovered", start="shrunk", distill=learn, optim=recover, steps=120),
            Stage(name="student", model=STUDENT, distill=learn, steps=250),
            Stage(name="student-control", model=STUDENT, steps=250),
            Stage(name="int8", start="teacher", compress=(Quantize(rules=INT8),), steps=0, export=True),
            Stage(name="int4", start="teacher", compress=(Quantize(rules=INT4),), steps=0, export=True),
            Stage(
                name="qat-int4",
                start="teacher",
                compress=(Quantize(rules=INT4),),
                optim=recover,
                steps=60,
            ),
            Stage(name="qat-int4-packed", start="qat-int4", steps=0, export=True),
            Stage(
                name="all-three",
                start="teacher",
                compress=(Prune(sparsity=0.5, end=30, every=5), Quantize(rules=INT8)),
                distill=learn,
                optim=recover,
                steps=80,
            ),
            Stage(name="all-three-packed", start="all-three", steps=0, export=True),
        ),
        claims=(
            Claim(artifact="teacher", of="student"),
            Claim(artifact="student", of="student-control"),
            Claim(artifact="int8", of="teacher", within=0.005, bytes_at_most=0.27),
            Claim(artifact="qat-int4-packed", of="int4"),
            Claim(artifact="pruned", of="teacher", within=0.10),
            Claim(artifact="shrunk-recovered", of="teacher", within=0.10),
            Claim(artifact="all-three-packed", of="teacher", within=0.10),
        ),
    )
