"""In which order the tokens of a row lie on the devices of the `context` axis, and what that costs whom.

Cut in plain order, the first device has almost nothing to attend to and the last one everything. In zig-zag order a row is cut in twice as many chunks as
there are devices, and device `i` holds chunk `i` and, from the other end, chunk `2 * devices - 1 - i`: all have equally many pairs of chunks
to compute (balance for ring attention: Brandon et al. 2023, https://arxiv.org/abs/2311.09431; this order: Llama Team 2024,
https://arxiv.org/abs/2407.21783, section 3.3.2). A batch is put in this order as it is placed on the mesh, and per-token results are put back as they
leave; between, only attention needs to know.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lmeff.core.errors import ConfigError

CHUNKS = {"ring": 2, "ulysses": 1, "gather": 2}  # of each device, by form of context parallelism; 2 is zig-zag


def own_chunks(device: Any, devices: int, chunks: int) -> tuple[Any, ...]:
    """The chunks that a device holds, ascending; `device` may be traced."""
    return (device,) if chunks == 1 else (device, 2 * devices - 1 - device)


def own_indices(device: Any, devices: int, chunks: int, length: int) -> Any:
    """The index in the row of each of the `length` tokens that a device holds, ascending; `device` may be traced."""
    numpy = np if isinstance(device, int) else jnp
    size = length // chunks
    return numpy.concatenate([chunk * size + numpy.arange(size) for chunk in own_chunks(device, devices, chunks)])


def token_order(form: str, tokens: int, devices: int) -> np.ndarray:
    """The index in the row of each token, in the order in which they lie on the mesh; raises `ConfigError` where chunks would be uneven."""
    check_tokens("batch", form, tokens, devices)
    if devices == 1:
        return np.arange(tokens)
    own = [own_indices(device, devices, CHUNKS[form], tokens // devices) for device in range(devices)]
    return np.concatenate(own)


def check_tokens(where: str, form: str, tokens: int, devices: int) -> None:
    """Refuses rows that the context axis cannot cut evenly."""
    parts = CHUNKS[form] * devices if devices > 1 else 1
    if tokens % parts:
        below, above = tokens // parts * parts, -(-tokens // parts) * parts
        sizes = f"{below} or {above}" if below else f"{above}"
        why = f"{CHUNKS[form]} x mesh.context = {parts}" if CHUNKS[form] > 1 else f"mesh.context = {parts}"
        raise ConfigError(
            f"{where}: got rows of {tokens} tokens, expected a multiple of {why} for mesh.sequence '{form}'; "
            f"every device takes equally many. Set it to {sizes}, or lower mesh.context."
        )


def to_row(x: Any, devices: int, chunks: int) -> Any:
    """[B, S, ...] of all devices one after the other, back in the order of the row."""
    if chunks == 1:
        return x
    pairs = x.reshape(x.shape[0], devices, 2, -1, *x.shape[2:])
    both = jnp.concatenate([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], 1)], 1)
    return both.reshape(x.shape)


def from_row(x: Any, devices: int, chunks: int) -> Any:
    """The inverse of `to_row`."""
    if chunks == 1:
        return x
    both = x.reshape(x.shape[0], 2 * devices, -1, *x.shape[2:])
    pairs = jnp.stack([both[:, :devices], jnp.flip(both[:, devices:], 1)], 2)
    return pairs.reshape(x.shape)


def pairs(device: int, other: int, devices: int, chunks: int, size: int, window: int | None) -> int:
    """How many of the pairs (chunk of queries of `device`, chunk of keys of `other`) have anything to compute, for chunks of `size` tokens."""
    count = 0
    for t in own_chunks(device, devices, chunks):
        for s in own_chunks(other, devices, chunks):
            nearest = 0 if t == s else (t - s - 1) * size + 1
            count += t >= s and (window is None or nearest < window)
    return count


def work(devices: int, chunks: int, *, size: int = 1, window: int | None = None) -> list[int]:
    """Causal pairs of chunks that each device computes in one forward pass, all over the ring."""
    return [sum(pairs(i, j, devices, chunks, size, window) for j in range(devices)) for i in range(devices)]


def reach(devices: int, chunks: int, size: int, window: int | None) -> tuple[int, int]:
    """How many neighbours' keys the ring must bring from behind and from ahead, (behind, ahead): each device's, in turn.

    Behind is device `i - 1` and on, ahead `i + 1` and on. Without a window all come from behind.
    """
    if window is None:
        return devices - 1, 0
    needed = [
        step
        for step in range(1, devices)
        if any(pairs(i, (i - step) % devices, devices, chunks, size, window) for i in range(devices))
    ]
    splits = ((behind, devices - min([s for s in needed if s > behind], default=devices)) for behind in range(devices))
    return min(splits, key=sum)
