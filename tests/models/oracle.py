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
            inner = [norm(v, own, "mlp_norm", cfg) for v in x]
            if cfg.moe is None:
                made = [mlp(v, own, cfg) for v in inner]
            else:
                made = experts(
                    inner, batch.segments[row], {path.removeprefix("moe/"): w for path, w in own.items()}, cfg
                )[0]
            x = [v + m for v, m in zip(x, made, strict=True)]
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


def experts(x, segments, p, cfg):
    """A row through its experts, token by token: outputs, and the row's statistics (balance, router_z, dropped)."""
    moe, tokens = cfg.moe, int((np.asarray(segments) > 0).sum())
    room = np.inf if moe.capacity is None else math.ceil(moe.capacity * len(x) * moe.top_k / moe.experts)
    likes, chosen, taken, z, dropped, outputs = [], [0] * moe.experts, [0] * moe.experts, 0.0, 0, []
    for v, segment in zip(x, segments, strict=True):
        out = np.zeros(cfg.width)
        if segment:
            scores = v @ p["router"]
            z += np.log(np.exp(scores).sum()) ** 2
            own = np.exp(scores) / np.exp(scores).sum()
            likes.append(own)
            best = sorted(range(moe.experts), key=lambda e: (-own[e], e))[: moe.top_k]
            total = sum(own[e] for e in best) if moe.normalize else 1.0
            for e in best:
                chosen[e] += 1
                if taken[e] < room:
                    taken[e] += 1
                    weights = {f"mlp/{name}": p[name][e] for name in ("up", "gate", "down") if name in p}
                    out += own[e] / total * mlp(v, weights, cfg)
                else:
                    dropped += 1
        if moe.shared:
            out += mlp(v, {f"mlp/{name}": p[f"shared/{name}"] for name in ("up", "gate", "down")}, cfg)
        outputs.append(out)
    share = np.array(chosen) * moe.experts / (moe.top_k * max(tokens, 1))
    balance = share @ np.sum(likes, axis=0) / tokens if tokens else 0.0
    return outputs, {
        "balance": balance,
        "router_z": z / max(tokens, 1),
        "dropped": dropped / (moe.top_k * max(tokens, 1)),
    }


def gelu(x):
    """The tanh form of Hendrycks & Gimpel 2016."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
