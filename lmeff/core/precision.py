"""Mixed precision as a policy string: which dtype each role has."""

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lmeff.core.errors import ConfigError

DTYPES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "f32": jnp.float32,
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Dtypes by role (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    params:  the stored weights, which the optimizer updates.
    compute: activations and the weights as the forward pass sees them. Sums of products, norms and softmax are float32 in any case.
    output:  the last hidden state that the loss sees; logits are float32 in any case.
    state:   the optimizer's moments (all of them, the second too) between steps; a step computes in float32. Not float16: squares underflow.
    """

    params: Any = jnp.float32
    compute: Any = jnp.float32
    output: Any = jnp.float32
    state: Any = jnp.float32

    def __str__(self) -> str:
        """The text `parse` reads."""
        return ",".join(f"{f.name}={jnp.dtype(getattr(self, f.name)).name}" for f in dataclasses.fields(self))

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients underflow without a loss scale: float16 has 5 bits of exponent."""
        return self.compute == jnp.float16


@functools.lru_cache(maxsize=64)  # a search for a mesh asks tens of thousands of times
def parse(text: str) -> Policy:
    """Reads `params=float32,compute=bfloat16,output=float32,state=float32`; any part may be left out (float32)."""
    roles = [f.name for f in dataclasses.fields(Policy)]
    chosen: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, _, dtype = (piece.strip() for piece in part.partition("="))
        if role not in roles:
            raise ConfigError(
                f"precision: got '{part}', expected one of {', '.join(roles)} = dtype{_nearest(role, roles)}"
            )
        if role in chosen:
            raise ConfigError(f"precision: '{role}' is given twice in '{text}'; keep one")
        if dtype not in DTYPES:
            names = sorted(name for name in DTYPES if len(name) > 4)
            raise ConfigError(
                f"precision.{role}: got '{dtype}', expected one of {', '.join(names)}{_nearest(dtype, names)}"
            )
        chosen[role] = DTYPES[dtype]
    if chosen.get("state") == jnp.float16:
        raise ConfigError(
            "precision.state: got float16, in which squares of gradients underflow; expected float32 or bfloat16"
        )
    return Policy(**chosen)


def _nearest(word: str, names: list[str]) -> str:
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f"; did you mean '{found[0]}'?" if found else ""
