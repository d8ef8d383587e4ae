"""The whole model in NumPy float64, one token and one head at a time: written from the papers and not from the code it checks."""

import math

import numpy as np


def forward(params, batch, cfg):
    """Logits [B, T, V]; rows of padding tokens are whatever their norms make of them."""
    p = {path: np.asarray(w, np.float64) for path, w in params.items()}
    logits = []
    for row in range(len(batch.tokens)):
        segments, positions = batch.segments[row], batch.positions[row]
        x = [embedded(token, position, p, cfg) for token, position in zip(batch.tokens[row], positions, strict=True)]
        for layer in range(cfg.layers):
            own = {path.removeprefix("blocks/"): w[layer] for path, w in p.items() if path.startswith("blocks/")}
            mixed = attention([before(v, own, "attn", cfg) for v in x], own, segments, positions, cfg, layer)
            x = [v + after(m, own, "attn", cfg) for v, m in zip(x, mixed, strict=True)]
            inner = [before(v, own, "mlp", cfg) for v in x]
            if cfg.moe is None:
                made = [mlp(v, own, cfg) for v in inner]
            else:
                made = experts(inner, segments, {path.removeprefix("moe/"): w for path, w in own.items()}, cfg)[0]
            x = [v + after(m, own, "mlp", cfg) for v, m in zip(x, made, strict=True)]
        head = p["embed/table"].T if cfg.tied else p["head/w"]
        out = np.stack([norm(v, p, "final_norm", cfg) for v in x]) @ head
        logits.append(cap(out, cfg.logit_softcap))
    return np.stack(logits)


def embedded(token, position, p, cfg):
    row = p["embed/table"][token] * (cfg.embed_scale or 1)
    return row + p["embed/positions"][position] if cfg.positions == "learned" else row


def before(v, p, sublayer, cfg):
    return v if cfg.norm_at == "post" else norm(v, p, f"{sublayer}_norm", cfg)


def after(v, p, sublayer, cfg):
    return v if cfg.norm_at == "pre" else norm(v, p, f"{sublayer}_post_norm", cfg)


def cap(x, limit):
    return x if limit is None else limit * np.tanh(x / limit)


def norm(v, p, name, cfg):
    if cfg.norm == "layer":
        return (v - v.mean()) / np.sqrt(v.var() + cfg.norm_eps) * p[f"{name}/scale"] + p[f"{name}/bias"]
    return rms(v, cfg) * (p[f"{name}/scale"] + cfg.norm_plus_one)


def rms(v, cfg):
    return v / np.sqrt(np.mean(v**2) + cfg.norm_eps)


def rotate(v, position, frequencies, amplitude):
    """Of the first channels, pairs (i, i + R/2) turn by position times their frequency; the rest stays."""
    half = len(frequencies)
    out = v.copy()
    for i, frequency in enumerate(frequencies):
        cos, sin = amplitude * math.cos(position * frequency), amplitude * math.sin(position * frequency)
        out[i] = v[i] * cos - v[i + half] * sin
        out[i + half] = v[i + half] * cos + v[i] * sin
    return out


def turning(cfg, layer, length):
    """(frequencies, what turned heads are multiplied by) of a layer for a document of so many tokens."""
    width = int((cfg.head_width or cfg.width // cfg.heads) * cfg.rope_fraction)
    pairs = range(width // 2)
    if cfg.rope_local_theta is not None and layer not in cfg.full_layers:
        return [cfg.rope_local_theta ** (-2 * i / width) for i in pairs], 1.0
    plain = [cfg.rope_theta ** (-2 * i / width) for i in pairs]
    s = cfg.rope_scaling
    if s is None:
        return plain, 1.0
    if s.kind == "linear":
        return [f / s.factor for f in plain], 1.0
    if s.kind == "dynamic":
        longer = s.factor * max(length, s.original) / s.original - (s.factor - 1)
        theta = cfg.rope_theta * longer ** (width / (width - 2))
        return [theta ** (-2 * i / width) for i in pairs], 1.0
    if s.kind == "llama3":
        return [llama3(f, s) for f in plain], 1.0
    if s.kind == "yarn":
        amplitude = s.attention if s.attention is not None else 0.1 * math.log(s.factor) + 1
        return [yarn(i, f, s, cfg.rope_theta, width) for i, f in enumerate(plain)], amplitude
    divisors = s.long if length > s.original else s.short
    amplitude = s.attention if s.attention is not None else math.sqrt(1 + math.log(s.factor) / math.log(s.original))
    return [f / d for f, d in zip(plain, divisors, strict=True)], amplitude


def llama3(frequency, s):
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original / s.high:
        return frequency
    if wavelength > s.original / s.low:
        return frequency / s.factor
    smooth = (s.original / wavelength - s.low) / (s.high - s.low)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def yarn(i, frequency, s, theta, width):
    def pair(turns):
        return width * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(s.beta_fast), pair(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return ramp * frequency / s.factor + (1 - ramp) * frequency


def projected(v, p, kind, cfg):
    """Query, key or value heads of one token, [heads, C], before rotation."""
    heads = np.einsum("d,dhc->hc", v, p[f"attn/w{kind}"])
    if cfg.bias != "none":
        heads = heads + p[f"attn/{kind}_bias"]
    if cfg.qk_norm is None or kind == "v":
        return heads
    scale = p[f"attn/{kind}_norm"] + cfg.norm_plus_one
    if cfg.qk_norm == "width":
        return rms(heads.ravel(), cfg).reshape(heads.shape) * scale
    return np.stack([rms(h, cfg) for h in heads]) * scale


def attention(x, p, segments, positions, cfg, layer):
    def turned(kind):
        made = []
        for t, v in enumerate(x):
            length = 1 + max(positions[s] for s in range(len(x)) if segments[s] == segments[t])
            heads = projected(v, p, kind, cfg)
            if cfg.positions == "rope":
                heads = np.stack([rotate(head, positions[t], *turning(cfg, layer, length)) for head in heads])
            made.append(heads)
        return made

    q, k, v = turned("q"), turned("k"), [projected(u, p, "v", cfg) for u in x]
    width = cfg.head_width or cfg.width // cfg.heads
    scale = cfg.attention_scale if cfg.attention_scale is not None else 1 / math.sqrt(width)
    window = len(x) if cfg.window is None or layer in cfg.full_layers else cfg.window
    mixed = []
    for t in range(len(x)):
        total = np.zeros(cfg.width)
        for head in range(cfg.heads):
            group = head // (cfg.heads // cfg.kv_heads)
            seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0 and t - s < window]
            if seen:
                scores = [cap(q[t][head] @ k[s][group] * scale, cfg.attention_softcap) for s in seen]
                weights = np.exp(np.array(scores) - max(scores))
                heard = sum(w * v[s][group] for w, s in zip(weights / weights.sum(), seen, strict=True))
                total += heard @ p["attn/wo"][head]
        mixed.append(total + p["attn/o_bias"] if cfg.bias in ("attention", "all") else total)
    return mixed


def mlp(x, p, cfg):
    h = x @ p["mlp/up"] + (p["mlp/up_bias"] if cfg.bias == "all" else 0)
    if cfg.activation == "swiglu":
        gate = x @ p["mlp/gate"]
        h = gate / (1 + np.exp(-gate)) * h
    elif cfg.activation == "geglu":
        h = gelu(x @ p["mlp/gate"]) * h
    else:
        h = gelu(h)
    return h @ p["mlp/down"] + (p["mlp/down_bias"] if cfg.bias == "all" else 0)


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
