"""What lives at the worst moment of a block's backward pass, of its forward pass, and of a chunk of the loss, in letters, by platform.

Read off XLA's buffer assignments (`XLA_FLAGS=--xla_dump_to=...`, the values that are live where the temporaries' block is fullest), and named after what
the model computes. A row `"BTF": (4, 3)` is four arrays in the dtype of compute and three in float32. `t` is time as the residual stream is cut, `T` time whole
over tensor, M the rows of a buffer of experts.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lmeff.models.config import ModelConfig
from lmeff.models.remat import parse
from lmeff.models.splash import LANES
from lmeff.models.transformer import sites
from lmeff.parallel.mesh import Layout

Live = dict[str, tuple[float, float]]


class Saved(NamedTuple):
    """What a remat policy keeps of a block."""

    everything: bool
    attention: bool
    hidden: bool
    products: bool

    @classmethod
    def of(cls, remat: str, cfg: ModelConfig) -> "Saved":
        """From its text."""
        policy = parse(remat, sites(cfg))
        everything, names = policy.kind == "none", set(policy.names)
        products = "product" in names or {f"{'mlp' if cfg.moe is None else 'moe'}.up"} <= names
        return cls(
            everything, everything or "attn_out" in names, everything or "mlp_hidden" in names, everything or products
        )


def total(live: Live, sizes: Mapping[str, int], narrow: int) -> float:
    """Bytes of a table, where letters have these sizes and a number of the compute dtype so many bytes."""
    each = ((math.prod(sizes[letter] for letter in letters), counts) for letters, counts in live.items())
    return sum(size * (own * narrow + wide * 4) for size, (own, wide) in each)


def add(*tables: Live) -> Live:
    """The rows of all tables together."""
    rows = dict.fromkeys(letters for table in tables for letters in table)
    return {r: (sum(t.get(r, (0, 0))[0] for t in tables), sum(t.get(r, (0, 0))[1] for t in tables)) for r in rows}


def ffn_backward(layout: Layout, cfg: ModelConfig, saved: Saved) -> list[Live]:
    """Moments while the ffn goes back, of which the fullest counts; what was recomputed of attention waits for its turn."""
    return (
        _tpu(cfg, saved, partial=arrives(layout) and saved.everything, summed=layout.mesh.shape["tensor"] > 1)
        if layout.platform == "tpu"
        else _cpu(cfg, saved)
    )


def arrives(layout: Layout) -> bool:
    """Whether XLA for TPUs multiplies with parts of weights as they arrive (collective matmul). It did on 8, 16 and 64 devices of an fsdp axis, and not on
    4 or 256. Where something is recomputed, weights of the ffn are gathered first (`lmeff.parallel.seam.gathering_einsum`)."""
    return 8 <= layout.size(layout.axes("D")) <= 64


def _cpu(cfg: ModelConfig, saved: Saved) -> list[Live]:
    """XLA for the CPU multiplies with transposed copies, and zeroes the loops' results (gradients of q, k and v) long before the loops begin."""
    hidden, gate = _hidden(cfg), int(cfg.gated)
    attention: Live = {"BTHC": (1, 1), "BTKC": (2, 2)}  # q, k, v, and zeros for their gradients
    if saved.everything:
        return [add(attention, {"BtD": (2, 0), "BTD": (4, 0), "BTHC": (1, 0), hidden: (2 + gate, 1)})]
    if saved.products:
        # No product is run again. Early: all that the activation needs; late: gradients of up and gate, of the norm by both, their sum.
        early: Live = {"BtD": (3, 0), hidden: (3 + gate, 1)}
        late: Live = {"BtD": (4, 0), "BTD": (4, 1 + gate), "BTHC": (0, 1), hidden: (1 + gate, 0)}
        return [add(attention, early), add(attention, late)]
    again: Live = {
        "BtD": (3, 0),  # the block's input, what attention made of it, the gradient of the output
        "BTD": (4, 0),  # both norms' outputs, as they are and transposed for the gradients of weights
        "BTHC": (0, 0) if saved.attention else (1, 1),  # attention's output, by units and transposed
        # Sigmoid, hidden, gradients of up and gate; up, gate, gradient of hidden
        hidden: (3 + gate - saved.hidden, 2 + gate),
    }
    if cfg.moe is not None:
        # Rows as they are sent, the gradient of what comes back; and of products in a loop the zeroed results.
        loop = cfg.moe.capacity is None
        again = add(again, {"MD": (2, 2 * loop), "MF": (-1, loop)})
    return [add(attention, again)]


def _hidden(cfg: ModelConfig) -> str:
    return "BTF" if cfg.moe is None else "MF"


def _tpu(cfg: ModelConfig, saved: Saved, *, partial: bool, summed: bool) -> list[Live]:
    """partial: sums over what has arrived of the weights are float32, at the peak that of the gradient of hidden.
    summed: so is the gradient of the ffn's input until it is summed over tensor.
    """
    gate = int(cfg.gated)
    again = 0 if saved.products else 1 + gate
    return [
        {
            # Documents for the kernel, cosines and sines: a number, or few, a token fill a vector
            "BT": (0, 4 * LANES),
            # The block's input, sliced and as it is used, what attention made of it, the gradient of the output
            "BtD": (4, 0),
            "BTD": (2, int(summed)),  # both norms' outputs
            "BTHC": (1 if saved.attention else 3, 0),  # q, attention's output as the kernel left it and masked
            "BTKC": (2, 0),
            # up, gate; hidden and the gradients of up and gate
            _hidden(cfg): (again + 2 + gate - saved.hidden, int(partial)),
        }
    ]


def ffn_forward(layout: Layout, cfg: ModelConfig, *, everything: bool) -> Live:
    """While the ffn of a layer goes forward: the stream, its norm, up, gate and hidden; sums over parts of weights that arrive are float32.

    everything: no remat policy, so that weights are not gathered first.
    """
    partial = layout.platform == "tpu" and arrives(layout) and everything
    gate = int(cfg.gated)
    return {"BtD": (3, 0), "BTD": (2, 0), _hidden(cfg): (1, 1 + gate) if partial else (2 + gate, 0)}


def attention_loop(layout: Layout) -> Live:
    """A ring of devices carries keys, values and their gradients as one float32 message, of which there are four: held, sent, arrived, joined."""
    ring = layout.mesh.shape["context"] > 1 and layout.plan.sequence == "ring"
    return {"BTKC": (0, 16 * ring), "BTHC": (0, 1 * ring)}


def loss_rows(layout: Layout, of_teacher: bool, taught: bool) -> tuple[int, int]:
    """(logits [N, V], heads [V, D]) in float32 of a chunk: the student's logits, their softmax, and beside a teacher's as much again for the divergence.

    Heads: in float32, its gradient so far, and that of the chunk. A TPU's fusions leave one array of logits, and add to the gradient in place.
    """
    tpu = layout.platform == "tpu"
    if of_teacher:
        return (1 if tpu else 2), 0
    return (2 if taught else 1) * (1 if tpu else 2), (2 if tpu else 3)


# MiB of a chip's vector memory (of v4, of its common memory) that XLA keeps arrays in: the largest block of that memory space in programs that were dumped.
VECTOR_MEMORY = {"v4": 128, "v5e": 112, "v5p": 45, "v6e": 95, "tpu7x": 64}
