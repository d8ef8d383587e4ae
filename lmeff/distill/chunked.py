"""The vocabulary loss without the logits: head and loss in chunks of tokens, never [B, T, V] at once.

The gradients are made in the forward pass, chunk by chunk, while the chunk's logits are there; the backward pass only scales them. So nothing
is computed twice and the peak is one chunk of logits, not all of them (the idea of Liger's fused losses, https://arxiv.org/abs/2410.10989, for any row loss).
With the vocabulary cut over mesh axes, each device sees its part of the logits and the row losses below reduce over these axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]
RowLoss = Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Sums]]


def chunked_head(
    row_loss: RowLoss,
    hidden_ND: jax.Array,
    head: Any,
    rows: Any,
    extras: Any,
    *,
    chunk: int,
    vocab_axes: tuple[str, ...] = (),
    batch_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, Sums]:
    """Sums `row_loss(hidden, head, rows, extras) -> (objective [n], metrics {name: [n]})` over all rows; differentiable in hidden and head.

    rows:       arrays with leading [N] (targets, weights, a teacher's hidden states); a row of zeros, weight 0, must cost 0: padding is such a row.
    extras:     whatever else the rows need (a teacher's head); not differentiated.
    vocab_axes: the mesh axes that `head` is cut over along the vocabulary, inside `jax.shard_map`.
    batch_axes: the mesh axes that rows are cut over, inside `jax.shard_map`: sums, and the head's gradient, are added over them. Over an axis of
                both, the rows of a chunk are gathered, so that every device sees its part of the vocabulary for all of them.
    """
    shared = tuple(axis for axis in batch_axes if axis in vocab_axes)
    rows_only, vocab_only = _without(batch_axes, shared), _without(vocab_axes, shared)

    dtypes = jax.tree.map(lambda x: x.dtype, head)

    def row_sums(hidden: Any, head: Any, rows: Any, extras: Any) -> tuple[jax.Array, Sums]:
        head = jax.tree.map(lambda x, dtype: x.astype(dtype), head, dtypes)
        count = hidden.shape[0]
        hidden, rows = jax.tree.map(lambda x: _gathered(x, shared), (hidden, rows))
        with jax.named_scope("head"):
            per_row = row_loss(hidden, head, rows, extras)
        # Each device adds up its own rows alone: the sum over devices then has each row once, and so does its gradient.
        objective, metrics = jax.tree.map(lambda x: _own(x, count, shared).sum(), per_row)
        return objective, metrics

    def pieces(hidden_ND: jax.Array, rows: Any) -> Any:
        return jax.tree.map(lambda x: _cut(x, chunk), (hidden_ND, rows))

    def value(hidden_ND: jax.Array, head: Any, rows: Any, extras: Any) -> tuple[jax.Array, Sums]:
        def add(sums: Any, piece: Any) -> tuple[Any, None]:
            return _add(sums, row_sums(piece[0], head, piece[1], extras)), None

        cut = pieces(hidden_ND, rows)
        shapes = jax.eval_shape(row_sums, *_first(cut, head), extras)
        return jax.lax.scan(add, _zeros(shapes, batch_axes), cut)[0]

    def save(hidden_ND: jax.Array, head: Any, rows: Any, extras: Any) -> Any:
        gradient = jax.value_and_grad(row_sums, argnums=(0, 1), has_aux=True)

        def add(carry: Any, piece: Any) -> tuple[Any, jax.Array]:
            sums, d_head = carry
            chunk_sums, (d_hidden, d_chunk) = gradient(piece[0], head, piece[1], extras)
            return (_add(sums, chunk_sums), _add(d_head, d_chunk)), d_hidden

        cut = pieces(hidden_ND, rows)
        shapes = jax.eval_shape(row_sums, *_first(cut, head), extras)
        start = (_zeros(shapes, batch_axes), _zeros(head, batch_axes + vocab_only))
        (sums, d_head), d_hidden = jax.lax.scan(add, start, cut)
        d_hidden = d_hidden.reshape(-1, *hidden_ND.shape[1:])[: hidden_ND.shape[0]]
        return sums, (d_hidden, d_head)

    call = jax.custom_vjp(value)
    call.defvjp(save, _scaled)
    # Each part of the vocabulary gives its part of the hidden states' gradient, and each part of the rows its part of the head's, in float32; the
    # casts' own gradients add them up, once and not in every chunk. Sums are added outside too: so it is right whether or not `jax.shard_map` checks.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), head)
    return _psum(call(_vary(hidden_ND, vocab_only), _vary(wide, rows_only), rows, extras), batch_axes)


def _scaled(gradients: Any, cotangent: Any) -> Any:
    """The backward pass: gradients were made in the forward pass, for a cotangent of 1."""
    scale = cotangent[0]
    d_hidden, d_head = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    return d_hidden, d_head, None, None


def _without(axes: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in others)


def _gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _own(x_N: jax.Array, count: int, axes: tuple[str, ...]) -> jax.Array:
    """Zeros in place of the rows of other devices."""
    if not axes:
        return x_N
    return jnp.where(jnp.arange(x_N.shape[0]) // count == jax.lax.axis_index(axes), x_N, 0)


def map_rows(fn: Callable[[Any], Any], rows: Any, *, chunk: int) -> Any:
    """`fn` of every row [N, ...] -> a tree of [N], a chunk of rows at a time. For evaluation: keeps no gradients."""
    count = jax.tree.leaves(rows)[0].shape[0]
    found = jax.lax.map(fn, jax.tree.map(lambda x: _cut(x, chunk), rows))
    return jax.tree.map(lambda x: x.reshape(-1)[:count], found)


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """[N, ...] to [chunks, chunk, ...], padded with zeros."""
    missing = -x.shape[0] % min(chunk, x.shape[0])
    padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
    return padded.reshape(-1, min(chunk, x.shape[0]), *x.shape[1:])


def _first(cut: Any, head: Any) -> tuple[Any, Any, Any]:
    hidden, rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cut)
    return hidden, head, rows


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)


def _vary(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def _zeros(shapes: Any, axes: tuple[str, ...]) -> Any:
    return _vary(jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes), axes)


def _psum(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(tree, axes) if axes else tree


def vocab_log_softmax(logits_NV: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Log-probabilities of this device's part of the vocabulary, normalised over all of it."""
    top_N1 = jax.lax.stop_gradient(logits_NV).max(-1, keepdims=True)
    if axes:
        top_N1 = jax.lax.pmax(top_N1, axes)
    shifted = logits_NV - top_N1
    return shifted - jnp.log(vocab_sum(jnp.exp(shifted), axes))[:, None]


def vocab_sum(x_NV: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sum over the whole vocabulary, [N]."""
    total_N = x_NV.sum(-1)
    return total_N if not axes else jax.lax.psum(total_N, axes)


def pick_target(x_NV: jax.Array, targets_N: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The entry of each row's target, [N]; by comparison and not by index, so that no part of the vocabulary is gathered."""
    first = 0 if not axes else jax.lax.axis_index(axes) * x_NV.shape[-1]
    is_target_NV = first + jnp.arange(x_NV.shape[-1])[None, :] == targets_N[:, None]
    return vocab_sum(jnp.where(is_target_NV, x_NV, 0.0), axes)


def top_token(logits_NV: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The id of each row's largest logit, [N]; of equal ones the first, as `argmax` has it."""
    part = logits_NV.shape[-1]
    best_N, top_N = jnp.argmax(logits_NV, -1).astype(jnp.int32), logits_NV.max(-1)
    if not axes:
        return best_N
    best_N = best_N + jax.lax.axis_index(axes) * part
    beyond = part * jax.lax.axis_size(axes)
    return jax.lax.pmin(jnp.where(top_N == jax.lax.pmax(top_N, axes), best_N, beyond), axes)


def cross_entropy_rows(logits_NV: jax.Array, targets_N: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Negative log-likelihood of each target in nats, [N]."""
    return -pick_target(vocab_log_softmax(logits_NV, axes), targets_N, axes)


def forward_kl_rows(
    student_NV: jax.Array, teacher_NV: jax.Array, temperature: float, axes: tuple[str, ...]
) -> jax.Array:
    """KL(teacher || student) of the softmaxes at a temperature, in nats, [N]."""
    student = vocab_log_softmax(student_NV / temperature, axes)
    teacher = vocab_log_softmax(teacher_NV / temperature, axes)
    return vocab_sum(jnp.exp(teacher) * (teacher - student), axes)
