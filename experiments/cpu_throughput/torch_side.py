"""The same model and step in eager PyTorch, written as PyTorch recommends: fused attention, fused AdamW, full logits."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from shapes import Shape


def make_step(shape: Shape, weights: dict[str, np.ndarray], tokens: np.ndarray, threads: int) -> Callable[[], float]:
    """A step on a fixed batch [B, T + 1] from lmeff's own initial weights (by path, stacked over layers); gives the loss."""
    torch.set_num_threads(threads)
    c, o = shape.model, shape.optim
    p = {path: torch.nn.Parameter(torch.tensor(w)) for path, w in _unstacked(weights).items()}
    matrices = [w for w in p.values() if w.ndim > 1]
    vectors = [w for w in p.values() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True)
    ids = torch.tensor(tokens, dtype=torch.long)
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    half = c.head_size // 2
    angles = torch.arange(shape.length)[:, None] * c.rope_theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]

    def rope(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def heads(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w).view(*x.shape[:2], -1, c.head_size)

    def block(x: torch.Tensor, i: int) -> torch.Tensor:
        own = {path.removeprefix(f"{i}/"): w for path, w in p.items() if path.startswith(f"{i}/")}
        h = F.rms_norm(x, (c.width,), own["attn_norm/scale"], c.norm_eps)
        q, k, v = (heads(h, own[f"attn/{name}"]) for name in ("wq", "wk", "wv"))
        q, k, v = (t.transpose(1, 2) for t in (rope(q), rope(k), v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.kv_heads)
        x = x + F.linear(a.transpose(1, 2).flatten(2), own["attn/wo"])
        h = F.rms_norm(x, (c.width,), own["mlp_norm/scale"], c.norm_eps)
        return x + F.linear(F.silu(F.linear(h, own["mlp/gate"])) * F.linear(h, own["mlp/up"]), own["mlp/down"])

    def step() -> float:
        x = F.embedding(inputs, p["embed/table"])
        for i in range(c.layers):
            x = block(x, i)
        x = F.rms_norm(x, (c.width,), p["final_norm/scale"], c.norm_eps)
        loss = F.cross_entropy(F.linear(x, p["embed/table"]).view(-1, c.vocab), targets)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), o.clip_norm)
        adamw.step()
        return loss.item()

    return step


def _unstacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One entry a layer, and matrices as `F.linear` wants them: [outputs, inputs]."""
    out = {path: w for path, w in weights.items() if not path.startswith("blocks/")}
    for path, stack in weights.items():
        if path.startswith("blocks/"):
            name = path.removeprefix("blocks/")
            out |= {f"{i}/{name}": _linear(name, w) for i, w in enumerate(stack)}
    return out


def _linear(name: str, w: np.ndarray) -> np.ndarray:
    if w.ndim == 1:
        return w
    inputs = int(np.prod(w.shape[:2])) if name == "attn/wo" else w.shape[0]
    return np.ascontiguousarray(w.reshape(inputs, -1).T)
