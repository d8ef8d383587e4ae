"""The feed-forward layer."""

import jax
from jax.ad_checkpoint import checkpoint_name

from lmeff.core.dims import shape
from lmeff.core.ops import Ops
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree
from lmeff.models.config import ModelConfig

GATE = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu}


def spec_of(
    cfg: ModelConfig,
    letters: str,
    contract: str = "",
    init: str = "normal",
    scale: float = 0.02,
    ffn: int | None = None,
) -> ParamSpec:
    """The spec of a parameter whose sizes come from the config; `ffn` is another width of F."""
    sizes = cfg.sizes if ffn is None else {**cfg.sizes, "F": ffn}
    return ParamSpec(letters=letters, shape=shape(letters, sizes), contract=contract, init=init, scale=scale)


def residual_scale(cfg: ModelConfig) -> float:
    """Matrices that write to the residual stream start smaller (GPT-2): its variance then does not grow with depth."""
    return 0.02 / (2 * cfg.layers) ** 0.5


def mlp_specs(cfg: ModelConfig, ffn: int | None = None) -> dict[str, ParamSpec]:
    """Its parameters; `ffn` is another width than the config's."""
    specs: dict[str, ParamSpec] = {
        "up": spec_of(cfg, "LDF", "D", ffn=ffn),
        "down": spec_of(cfg, "LFD", "F", scale=residual_scale(cfg), ffn=ffn),
    }
    if cfg.gated:
        specs["gate"] = spec_of(cfg, "LDF", "D", ffn=ffn)
    if cfg.bias == "all":
        specs |= {"up_bias": spec_of(cfg, "LF", init="zeros", ffn=ffn), "down_bias": spec_of(cfg, "LD", init="zeros")}
    return specs


def mlp_layer(x_BTD: jax.Array, p: Tree, cfg: ModelConfig, ops: Ops, site: str = "mlp") -> jax.Array:
    """The feed-forward layer: gated (Shazeer 2020) or plain; `site` names its products."""
    h_BTF = ops.einsum("BTD,DF->BTF", x_BTD, p["up"], site=f"{site}.up")
    if cfg.bias == "all":
        h_BTF = h_BTF + p["up_bias"]
    if cfg.gated:
        h_BTF = GATE[cfg.activation](ops.einsum("BTD,DF->BTF", x_BTD, p["gate"], site=f"{site}.gate")) * h_BTF
    else:
        h_BTF = GATE[cfg.activation](h_BTF)
    h_BTF = checkpoint_name(ops.place(h_BTF, "BTF"), "mlp_hidden")
    ops.tap(f"{site}.neurons", h_BTF)
    y_BTD = ops.einsum("BTF,FD->BTD", h_BTF, p["down"], site=f"{site}.down")
    return y_BTD + p["down_bias"] if cfg.bias == "all" else y_BTD


def mlp_sites(cfg: ModelConfig, site: str) -> list[str]:
    """The products of such a layer."""
    return [f"{site}.{name}" for name in (("up", "gate", "down") if cfg.gated else ("up", "down"))]
