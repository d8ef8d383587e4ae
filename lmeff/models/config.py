"""The shape of a model: one decoder-only transformer whose variants are fields, and presets by name."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmeff.core.errors import ConfigError
from lmeff.models import legal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than a model was pretrained with; only its own kind's fields count.

    kind:     "linear" (positions / factor: Chen et al. 2023, https://arxiv.org/abs/2306.15595), "dynamic" (NTK: theta grows with the row), "yarn" (Peng et al.
              2023, https://arxiv.org/abs/2309.00071), "llama3" (Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783), "longrope" (Ding et al. 2024,
              https://arxiv.org/abs/2402.13753).
    factor:   how many times longer contexts get.
    original: the context of pretraining, in tokens ("dynamic", "yarn", "llama3", "longrope").
    low, high: "llama3": wavelengths over original / low are divided by the factor, those under original / high stay, between is blended.
    beta_fast, beta_slow, truncate: "yarn": rotations over the original context from which, and up to which, frequencies stay or are divided; whether these
              bounds are whole numbers.
    attention: "yarn", "longrope": what cosines and sines are multiplied by; None follows from the factor.
    short, long: "longrope": divisors of each frequency, for rows up to the original context and beyond.
    """

    kind: str
    factor: float = 1.0
    original: int | None = None
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention: float | None = None
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuses kinds that do not exist, and numbers that their formulas do not take."""
        legal.check_scaling(self)


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts in place of every ffn: each token goes to the `top_k` experts that its router likes most.

    experts:   how many; each is an ffn of width model.ffn.
    top_k:     experts that a token goes to.
    shared:    experts that every token goes to besides (DeepSeekMoE: Dai et al. 2024, https://arxiv.org/abs/2401.06066).
    normalize: whether a token's weights sum to 1 over its experts (Mixtral) or are the softmax over all of them (Switch, DeepSeek-V2).
    capacity:  None drops no token. Otherwise an expert takes at most ceil(capacity x tokens of the row x top_k / experts) tokens of a row, the
               earlier ones; for those beyond it the layer adds nothing from this expert (GShard: Lepikhin et al. 2020,
               https://arxiv.org/abs/2006.16668). By row, so that the same tokens are dropped on every mesh; in order of time and not of choices, so
               that no token depends on a later one.
    balance:   weight of the load-balancing loss (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equation 4) of each row (DeepSeek-V2's
               sequence-wise form, https://arxiv.org/abs/2405.04434), summed over layers.
    router_z:  weight of the router's z-loss (ST-MoE: Zoph et al. 2022, https://arxiv.org/abs/2202.08906, equation 5), summed over layers.
    """

    experts: int = 8
    top_k: int = 2
    shared: int = 0
    normalize: bool = True
    capacity: float | None = None
    balance: float = 0.01
    router_z: float = 0.001

    def __post_init__(self) -> None:
        """Refuses what no router could do."""
        if self.experts < 1:
            raise ConfigError(f"model.moe.experts: got {self.experts}, expected at least 1")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"model.moe.top_k: got {self.top_k} of {self.experts} experts, expected 1 to {self.experts}: a token goes to an expert once. "
                "Lower top_k or raise experts."
            )
        for name in ("shared", "balance", "router_z"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.moe.{name}: got {getattr(self, name)}, expected 0 (off) or more")
        if self.capacity is not None and self.capacity <= 0:
            raise ConfigError(
                f"model.moe.capacity: got {self.capacity}, expected a positive factor (1 is room for evenly spread tokens), or None to drop none"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and variants of a decoder-only transformer.

    heads/kv_heads: equal is multi-head attention, 1 is multi-query, between is grouped-query.
    head_width:     None means width / heads.
    activation:     "swiglu" and "geglu" gate the ffn (three matrices), "gelu" does not (two).
    ffn:            width of the ffn, or of each expert.
    moe:            a mixture of experts in place of every ffn; None has none.
    norm:           "rms" or "layer" (with a bias). norm_plus_one: the weight of an RMSNorm is kept as its difference to 1 (Gemma).
    norm_at:        "pre": before attention and ffn. "post": of their outputs, before the residual sum (OLMo 2). "both" (Gemma 2).
    qk_norm:        RMSNorm of queries and keys, "head": of each head (Qwen3), "width": over all heads at once (OLMo 2).
    bias:           "none", "qkv" (Qwen2), "attention" (queries, keys, values and the output), or "all" (the ffn, too).
    positions:      "rope", or "learned": a table of `context` rows added to the embedding (GPT-2).
    context:        the longest row that positions exist for; None sets no limit.
    rope_scaling:   of the layers that see all; rope_local_theta: theta of the layers with a window, which are not scaled; None: all layers alike.
    rope_fraction:  share of a head's channels that turn, the first ones (Phi).
    window:         each token sees this many tokens up to itself; None sees all. full_layers: the layers, counted from 0, that see all nevertheless.
    logit_softcap:  final logits become cap * tanh(logits / cap); `attention_softcap` the same for attention scores.
    attention_scale: what scores are multiplied by; None is 1 / sqrt(head width).
    embed_scale:    what embeddings are multiplied by (Gemma: sqrt(width)).
    """

    vocab: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int | None = None
    ffn: int = 344
    moe: MoE | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_plus_one: bool = False
    norm_at: str = "pre"
    activation: str = "swiglu"
    positions: str = "rope"
    context: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    rope_fraction: float = 1.0
    tied: bool = True
    bias: str = "none"
    qk_norm: str | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    logit_softcap: float | None = None
    attention_softcap: float | None = None
    attention_scale: float | None = None
    embed_scale: float | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that no parameter tree exists for, and variants that exclude each other."""
        legal.check_model(self)

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width if self.head_width is not None else self.width // self.heads

    @property
    def rotary_size(self) -> int:
        """Channels of a head that turn with the position."""
        return int(self.head_size * self.rope_fraction) if self.positions == "rope" else 0

    @property
    def mixed(self) -> bool:
        """Whether some layers have a window and others see all."""
        return bool(self.full_layers)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """How far each layer sees; None of those that see all."""
        return tuple(None if layer in self.full_layers else self.window for layer in range(self.layers))

    @property
    def windows(self) -> tuple[tuple[int | None, int], ...]:
        """(window, layers that have it), None of those that see all: one pair where layers are alike."""
        return tuple(Counter(self.layer_windows).items())

    @property
    def gated(self) -> bool:
        """Whether the ffn has a gate."""
        return self.activation != "gelu"

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        return {
            "D": self.width,
            "H": self.heads,
            "K": self.kv_heads,
            "G": self.heads // self.kv_heads,
            "C": self.head_size,
            "F": self.ffn,
            "V": self.vocab,
            "L": self.layers,
            "E": self.moe.experts if self.moe is not None else 0,
            "P": self.context or 0,
        }


def read(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, also through JSON; reads what older versions wrote."""
    values = current(values)
    moe, scaling = values.get("moe"), values.get("rope_scaling")
    nested = {
        "moe": None if moe is None else MoE(**moe),
        "rope_scaling": None if scaling is None else RopeScaling(**{k: _tuple(x) for k, x in scaling.items()}),
    }
    return ModelConfig(**{key: _tuple(value) for key, value in (values | nested).items()})


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config in today's terms: biases and norms of queries and keys were on or off once."""
    once = {"bias": {False: "none", True: "all"}, "qk_norm": {False: None, True: "head"}}
    return {k: once[k][v] if k in once and isinstance(v, bool) else v for k, v in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def with_layers(cfg: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """The config of these of its layers, ascending, renumbered; where all that are left see all, without what only a window needs."""
    full = tuple(new for new, old in enumerate(kept) if old in cfg.full_layers)
    if len(full) == len(kept):
        return dataclasses.replace(cfg, layers=len(kept), full_layers=(), window=None, rope_local_theta=None)
    return dataclasses.replace(cfg, layers=len(kept), full_layers=full)


def preset(name: str, **changes: object) -> ModelConfig:
    """A preset with fields changed: `preset("tiny", vocab=512)`."""
    if name not in PRESETS:
        raise ConfigError(f"model preset: got '{name}', expected one of {sorted(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)  # type: ignore[arg-type]


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=64),
    "small": ModelConfig(vocab=512, width=64, layers=2, heads=4, kv_heads=2, ffn=172),
    # 124M and 1.2B parameters: Llama-style shapes near GPT-2 small and Llama-3.2-1B.
    "125m": ModelConfig(vocab=50_304, width=768, layers=12, heads=12, kv_heads=12, ffn=2048),
    "1b": ModelConfig(vocab=128_256, width=2048, layers=16, heads=32, kv_heads=8, ffn=8192, rope_theta=500_000.0),
    "moe_tiny": ModelConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=32, moe=MoE(experts=4)),
    # Jiang et al. 2024 (https://arxiv.org/abs/2401.04088), table 1: 46.7B parameters, 12.9B of them active.
    "mixtral_8x7b": ModelConfig(
        vocab=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        ffn=14_336,
        moe=MoE(experts=8, top_k=2, balance=0.02, router_z=0.0),
        rope_theta=1_000_000.0,
        tied=False,
    ),
    # Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783), table 3.
    "llama3_8b": ModelConfig(
        vocab=128_256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14_336, rope_theta=500_000.0, tied=False
    ),
    "llama3_70b": ModelConfig(
        vocab=128_256, width=8192, layers=80, heads=64, kv_heads=8, ffn=28_672, rope_theta=500_000.0, tied=False
    ),
}
