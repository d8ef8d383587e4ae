"""The shape of a model: one decoder-only transformer whose variants are fields, and presets by name."""

import dataclasses
from dataclasses import dataclass

from lmeff.core.errors import ConfigError

NORMS = ("rms", "layer")
ACTIVATIONS = ("swiglu", "geglu", "gelu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and variants of a decoder-only transformer.

    heads/kv_heads: equal is multi-head attention, 1 is multi-query, between is grouped-query.
    head_width:     None means width / heads.
    activation:     "swiglu" and "geglu" gate the ffn (three matrices), "gelu" does not (two).
    window:         each token sees this many tokens up to itself; None sees all.
    logit_softcap:  final logits become cap * tanh(logits / cap); `attention_softcap` the same for attention scores.
    """

    vocab: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int | None = None
    ffn: int = 344
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    rope_theta: float = 10_000.0
    tied: bool = True
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    logit_softcap: float | None = None
    attention_softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that no parameter tree exists for."""
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "ffn"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: got {getattr(self, name)}, expected at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.kv_heads: got {self.kv_heads}, expected a divisor of model.heads = {self.heads}")
        if self.head_width is None and self.width % self.heads:
            raise ConfigError(
                f"model.heads: got {self.heads}, expected a divisor of model.width = {self.width}; or set model.head_width"
            )
        if self.head_size % 2:
            raise ConfigError(f"model.head_width: got {self.head_size}, expected an even number (rotary pairs)")
        if self.norm not in NORMS:
            raise ConfigError(f"model.norm: got '{self.norm}', expected one of {NORMS}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"model.activation: got '{self.activation}', expected one of {ACTIVATIONS}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"model.window: got {self.window}, expected at least 1, or None for full attention")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width if self.head_width is not None else self.width // self.heads

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
        }


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
    # Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783), table 3.
    "llama3_8b": ModelConfig(
        vocab=128_256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14_336, rope_theta=500_000.0, tied=False
    ),
    "llama3_70b": ModelConfig(
        vocab=128_256, width=8192, layers=80, heads=64, kv_heads=8, ffn=28_672, rope_theta=500_000.0, tied=False
    ),
}
