"""Steps of Llama-like models whose FLOPs are written down by hand, as an independent truth for times and energies."""

from lmeff.models.config import ModelConfig, preset
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.estimate import Site, Work
from lmeff.plan.job import Job, Shape

BF16 = "params=float32,compute=bfloat16,output=bfloat16,state=float32"
SMALL = preset("1b")


def job_of(cfg: ModelConfig, devices: int, rows: int, tokens: int, remat: str = "none", **options) -> Job:
    """A step in bfloat16 over float32 parameters."""
    accumulate, steps, platform = (options.pop(key, default) for key, default in DEFAULTS.items())
    return Job(
        name="step",
        student=Shape(cfg=cfg),
        mesh=MeshPlan(**options),
        devices=devices,
        rows=rows,
        tokens=tokens,
        precision=BF16,
        remat=remat,
        accumulate=accumulate,
        steps=steps,
        platform=platform,
    )


def work_of(job: Job) -> Work:
    """Products of a dense gated model. "full" rematerialisation runs all layers again, "names" what makes q, k, v and the ffn's hidden states."""
    cfg, seen = job.cfg, job.rows * job.tokens
    products = [_product(job, *row) for row in _products(cfg)]
    flops = 4.0 * cfg.layers * seen * job.tokens * cfg.heads * cfg.head_size
    width = 2.0 * seen * cfg.layers * cfg.head_size
    attention = Site(
        "attention",
        "attention",
        "",
        cfg.layers,
        flops,
        (job.tokens + 1) / (2 * job.tokens),
        1.0,
        {"activation": width * (cfg.heads + 2 * cfg.kv_heads), "weight": 0.0},
        width * cfg.heads,
        "bfloat16",
    )
    forward, causal = sum(site.flops for site in products), attention.flops * attention.visible
    again = {"none": (), "full": LAYER, "names": INPUTS}[job.remat]
    parts = {
        "forward": forward,
        "backward": 2 * forward,
        "recompute": sum(site.flops for site in products if site.name in again) + causal * (job.remat == "full"),
        "attention forward": causal,
        "attention backward": 2 * causal,
    }
    return Work(
        sites=(*products, attention),
        teacher=(),
        parts=parts,
        model_full=3 * (forward + flops),
        model_causal=3 * (forward + causal),
        hardware=sum(parts.values()),
        effective=3 * (forward + causal),
        six_nd=3 * forward,
    )


def _products(cfg: ModelConfig):
    d, q, k = cfg.width, cfg.heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    return [
        ("attn.q", "BTD,DHC->BTHC", cfg.layers, d, q),
        ("attn.k", "BTD,DKC->BTKC", cfg.layers, d, k),
        ("attn.v", "BTD,DKC->BTKC", cfg.layers, d, k),
        ("attn.o", "BTHC,HCD->BTD", cfg.layers, q, d),
        ("mlp.up", "BTD,DF->BTF", cfg.layers, d, cfg.ffn),
        ("mlp.gate", "BTD,DF->BTF", cfg.layers, d, cfg.ffn),
        ("mlp.down", "BTF,FD->BTD", cfg.layers, cfg.ffn, d),
        ("head", "BTD,VD->BTV", 1, d, cfg.vocab),
    ]


def _product(job: Job, name: str, equation: str, layers: int, inputs: int, outputs: int) -> Site:
    seen = job.rows * job.tokens
    reads = {
        "activation": 2.0 * layers * seen * inputs,
        "weight": 2.0 * job.accumulate * layers * inputs * outputs,
    }
    flops, writes = 2.0 * layers * seen * inputs * outputs, 2.0 * layers * seen * outputs
    return Site(name, "product", equation, layers, flops, 1.0, 1.0, reads, writes, "bfloat16")


LAYER = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")
INPUTS = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.gate")
DEFAULTS = {"accumulate": 1, "steps": 1, "platform": "tpu"}
