"""The whole model in NumPy float64, one token and one head at a time: written from the papers and not from the code it checks."""

import math

import numpy as np


def forward(params, batch, cfg):
    """Logits [B, T, V]; rows of padding tokens are whatever their norms make of them."""
    p = {path: np.asarray(w, np.float64) for path, w in params.items()}
    logits = []
    for row in range(len(batch.tokens)):
        x = [p["embed/table"][token] for token in batch.tokens[row]]
        for layer in range(cfg.layers):
            own = {path.removeprefix("blocks/"): w[layer] for path, w in p.items() if path.startswith("blocks/")}
            mixed = attention(
                [norm(v, own, "attn_norm", cfg) for v in x], own, batch.segments[row], batch.positions[row], cfg
            )
            x = [v + m for v, m in zip(x, mixed, strict=True)]
            x = [v + mlp(norm(v, own, "mlp_norm", cfg), own, cfg) for v in x]
        head = p["embed/table"].T if cfg.tied else p["head/w"]
        out = np.stack([norm(v, p, "final_norm", cfg) for v in x]) @ head
        logits.append(cap(out, cfg.logit_softcap))
    return np.stack(logits)


def cap(x, limit):
    return x if limit is None else limit * np.tanh(x / limit)


def norm(v, p, name, cfg):
    if cfg.norm == "layer":
        return (v - v.mean()) / np.sqrt(v.var() + cfg.norm_eps) * p[f"{name}/scale"] + p[f"{name}/bias"]
    return v / np.sqrt(np.mean(v**2) + cfg.norm_eps) * p[f"{name}/scale"]


def rotate(v, position, theta):
    """Pairs (i, i + C/2) turn by position * theta^(-2i/C)."""
    half = len(v) // 2
    out = np.empty_like(v)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(v))
        out[i] = v[i] * math.cos(angle) - v[i + half] * math.sin(angle)
        out[i + half] = v[i + half] * math.cos(angle) + v[i] * math.sin(angle)
    return out


def projected(v, p, kind, cfg):
    """Query, key or value heads of one token, [heads, C], before rotation."""
    heads = np.einsum("d,dhc->hc", v, p[f"attn/w{kind}"])
    if cfg.bias:
        heads = heads + p[f"attn/{kind}_bias"]
    if cfg.qk_norm and kind != "v":
        heads = np.stack([h / np.sqrt(np.mean(h**2) + cfg.norm_eps) for h in heads]) * p[f"attn/{kind}_norm"]
    return heads


def attention(x, p, segments, positions, cfg):
    def turned(kind):
        return [
            np.stack([rotate(head, position, cfg.rope_theta) for head in projected(v, p, kind, cfg)])
            for v, position in zip(x, positions, strict=True)
        ]

    q, k, v = turned("q"), turned("k"), [projected(u, p, "v", cfg) for u in x]
    mixed = []
    for t in range(len(x)):
        total = np.zeros(cfg.width)
        for head in range(cfg.heads):
            group = head // (cfg.heads // cfg.kv_heads)
            seen = [
                s
                for s in range(t + 1)
                if segments[s] == segments[t] != 0 and (cfg.window is None or t - s < cfg.window)
            ]
            if seen:
                scores = [cap(q[t][head] @ k[s][group] / math.sqrt(cfg.head_size), cfg.attention_softcap) for s in seen]
                weights = np.exp(np.array(scores) - max(scores))
                heard = sum(w * v[s][group] for w, s in zip(weights / weights.sum(), seen, strict=True))
                total += heard @ p["attn/wo"][head]
        mixed.append(total + p["attn/o_bias"] if cfg.bias else total)
    return mixed


def mlp(x, p, cfg):
    h = x @ p["mlp/up"] + (p["mlp/up_bias"] if cfg.bias else 0)
    if cfg.activation == "swiglu":
        gate = x @ p["mlp/gate"]
        h = gate / (1 + np.exp(-gate)) * h
    elif cfg.activation == "geglu":
        h = gelu(x @ p["mlp/gate"]) * h
    else:
        h = gelu(h)
    return h @ p["mlp/down"] + (p["mlp/down_bias"] if cfg.bias else 0)


def gelu(x):
    """The tanh form of Hendrycks & Gimpel 2016."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
