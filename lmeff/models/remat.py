"""What the backward pass keeps of a block and what it computes again, by name.

| text | keeps |
|---|---|
| none | everything |
| dots | every product of activations and weights |
| names | attention outputs (with their log-sum-exp) and the hidden states of the ffn |
| save:NAME,... | what is named; names are those of `NAMES` and the sites of products, such as attn.q |
| offload:NAME,... | the same, in the host's memory until the backward pass needs it |
| budget:SIZE | the least recomputation whose kept bytes a device fit SIZE, such as 6GiB (`parallel.activations.choose`) |
| full | the block's input alone |
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lmeff.core.errors import ConfigError

NAMES = ("attn_out", "mlp_hidden", "product")  # "product" is every site at once
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
HOST = "pinned_host"


class Remat(NamedTuple):
    """A parsed policy: "none", "full", "save", "offload" or "budget"; the names it keeps, or the bytes a device that it may keep."""

    kind: str
    names: tuple[str, ...] = ()
    budget: int = 0


def parse(text: str, sites: Sequence[str]) -> Remat:
    """Reads `train.remat`; raises `ConfigError` for what is no policy or a name that no activation has.

    sites: the names of the block's products (`models.transformer.sites`).
    """
    if text in FIXED:
        return FIXED[text]
    kind, _, rest = text.partition(":")
    if kind == "budget" and (size := re.fullmatch(r"(\d+(?:\.\d+)?)(KiB|MiB|GiB)", rest)):
        return Remat("budget", budget=int(float(size[1]) * UNITS[size[2]]))
    known = (*NAMES, *(site for site in sites if site != "head"))  # the head is no part of a block
    names = tuple(rest.split(","))
    if kind in ("save", "offload") and set(names) <= set(known):
        return Remat(kind, names)
    raise ConfigError(
        f"train.remat: got '{text}', expected {', '.join(FIXED)}, budget:SIZE (such as budget:6GiB), save:NAME,... or offload:NAME,... "
        f"with names of {', '.join(known)}"
    )


def wrapper(remat: Remat) -> Callable[[Any], Any]:
    """A wrapper of the scanned block."""
    policies = jax.checkpoint_policies
    if remat.kind == "none":
        return lambda fn: fn
    if remat.kind == "full":
        policy = policies.nothing_saveable
    elif remat.kind == "save":
        policy = policies.save_only_these_names(*remat.names)
    else:
        assert remat.kind == "offload", "a budget is turned into a policy before anything is traced"
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(remat.names),
            offload_src="device",
            offload_dst=HOST,
        )
    return lambda fn: jax.checkpoint(fn, policy=policy, prevent_cse=False)


FIXED: dict[str, Remat] = {
    "none": Remat("none"),
    "dots": Remat("save", ("product",)),
    "names": Remat("save", ("attn_out", "mlp_hidden")),
    "full": Remat("full"),
}
