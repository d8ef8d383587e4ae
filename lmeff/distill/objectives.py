"""Objectives: `(layout, student output, teacher output, batch) -> (loss sum, metric sums)`, over weighted tokens.

Sums and not means: the caller divides once by the weight of the whole batch, so shards and microbatches cannot change the result.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.numerics import is_qtensor, materialize
from lmeff.core.ops import FLOATING, Numerics, Ranges, make_ops
from lmeff.distill.chunked import chunked_head, cross_entropy_rows, forward_kl_rows, map_rows
from lmeff.models.config import ModelConfig
from lmeff.models.moe import auxiliary
from lmeff.models.transformer import Output, project
from lmeff.parallel.mesh import WHOLE, Layout

Sums = dict[str, jax.Array]
Objective = Callable[[Layout, Output, Output | None, Batch], tuple[jax.Array, Sums]]

CHUNK = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation from an earlier artifact: `(1 - mix) * CE + mix * T^2 * KL(teacher || student)`, both at temperature T.

    The factor T^2 keeps the gradient's size as T changes (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
    """

    teacher: str
    mix: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values outside their range."""
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"distill.mix: got {self.mix}, expected 0 (labels only) to 1 (teacher only)")
        if self.temperature <= 0:
            raise ConfigError(f"distill.temperature: got {self.temperature}, expected a positive number")


class Projection(NamedTuple):
    """How a model's head turns hidden states into logits: its shape and its numerics."""

    cfg: ModelConfig
    numerics: Numerics = FLOATING

    def __call__(self, hidden_ND: jax.Array, head: Any, ranges: Ranges) -> jax.Array:
        """Logits [N, V] in float32; with a shard of the head, those of its part of the vocabulary."""
        return project(hidden_ND, head, self.cfg, make_ops(self.numerics, attend=_no_attention)(ranges).ops)


def _no_attention(*args: Any, **kwargs: Any) -> jax.Array:
    raise AssertionError("a head does not attend")


def head_objective(
    student: Projection, teacher: Projection | None = None, distill: Distill | None = None, *, chunk: int = CHUNK
) -> Objective:
    """Cross entropy, or its mix with forward KL to a teacher, from hidden states and heads in chunks of tokens.

    Metrics: "loss", the cross entropy in nats/token; with a teacher also "kl", at the distillation's temperature; with experts those of `auxiliary`,
    whose losses are added.
    """
    assert (teacher is None) == (distill is None)

    def objective(layout: Layout, s: Output, t: Output | None, batch: Batch) -> tuple[jax.Array, Sums]:
        shared = shared_axes(layout, student.cfg)
        rows, extras = {"targets": batch.targets, "weights": batch.weights}, {"ranges": s.ranges}
        letters, sums = {"ranges": _whole(s.ranges)}, {"loss": ""}
        if t is not None and teacher is not None:
            rows |= {"teacher": t.hidden_BTD}
            extras |= {"teacher_head": materialize(t.head), "teacher_ranges": t.ranges}
            letters |= {"teacher_head": _loss_letters(teacher.cfg, shared), "teacher_ranges": _whole(t.ranges)}
            sums |= {"kl": ""}

        def local(hidden: jax.Array, head: Any, rows: Any, extras: Any) -> tuple[jax.Array, Sums]:
            hidden, rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (hidden, rows))
            head = _by_vocabulary(head, student.cfg, shared)
            if teacher is not None:
                extras = extras | {"teacher_head": _by_vocabulary(extras["teacher_head"], teacher.cfg, shared)}
            axes = layout.axes("V") + shared
            loss = functools.partial(_row_loss, student, teacher, distill, axes)
            part = rows_at_once(chunk, layout, student.cfg, shared)
            options = {"chunk": part, "vocab_axes": axes, "batch_axes": layout.axes("BS")}
            return chunked_head(loss, hidden, head, rows, extras, **options)

        row_letters = jax.tree.map(lambda x: "BS" + WHOLE * (x.ndim - 2), rows)
        inputs = ("BS_", _loss_letters(student.cfg, shared), row_letters, letters)
        loss, metrics = layout.on_shards(local, inputs, ("", sums))(s.hidden_BTD, s.head, rows, extras)
        if not s.sums:
            return loss, metrics
        routing, told = auxiliary(s.sums, student.cfg)
        return loss + routing, {**metrics, **told}

    return objective


def _row_loss(
    student: Projection,
    teacher: Projection | None,
    distill: Distill | None,
    axes: tuple[str, ...],
    hidden: jax.Array,
    head: Any,
    rows: Any,
    extras: Any,
) -> tuple[jax.Array, Sums]:
    """The objective and the metrics of each row [N]; the vocabulary of both heads is cut over `axes`."""
    logits = student(hidden, head, extras["ranges"])
    loss = cross_entropy_rows(logits, rows["targets"], axes) * rows["weights"]
    if teacher is None or distill is None:
        return loss, {"loss": loss}
    target = teacher(rows["teacher"], extras["teacher_head"], extras["teacher_ranges"])
    kl = forward_kl_rows(logits, target, distill.temperature, axes) * rows["weights"]
    mixed = (1 - distill.mix) * loss + distill.mix * distill.temperature**2 * kl
    return mixed, {"loss": loss, "kl": kl}


RowMeasure = Callable[[jax.Array, jax.Array, tuple[str, ...]], Any]
"""`(logits [N, V], targets [N], axes of the vocabulary) -> a tree of [N]`."""


def by_token(model: Projection, measure: RowMeasure, *, chunk: int = CHUNK) -> Callable[[Layout, Output, Batch], Any]:
    """`measure` of every token's logits and target, a tree of [B, T] (0 where a target has no weight), without gradients; the head may be packed."""

    def measured(layout: Layout, out: Output, batch: Batch) -> Any:
        vocab = layout.axes("V")

        def local(hidden: jax.Array, head: Any, targets: jax.Array, weights: jax.Array, ranges: Ranges) -> Any:
            def piece(rows: Any) -> Any:
                return measure(model(rows[0], head, ranges), rows[1], vocab)

            found = map_rows(piece, (hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)), chunk=chunk)
            return jax.tree.map(lambda x: x.reshape(weights.shape) * (weights > 0), found)

        letters = ("BS_", head_letters(out.head, model.cfg), "BS", "BS", _whole(out.ranges))
        return layout.on_shards(local, letters, "BS")(
            out.hidden_BTD, out.head, batch.targets, batch.weights, out.ranges
        )

    return measured


def token_nll(model: Projection, *, chunk: int = CHUNK) -> Callable[[Layout, Output, Batch], jax.Array]:
    """Negative log-likelihood of every target [B, T] in nats (0 where it has no weight), without gradients; the head may be packed."""
    return by_token(model, cross_entropy_rows, chunk=chunk)


def head_letters(head: Any, cfg: ModelConfig) -> Any:
    """How a head enters the shards: cut over the vocabulary, whole over D. Of a packed head, the dims that share a scale stay whole."""
    cut = "V_" if cfg.tied else "_V"
    if not is_qtensor(head):
        return cut
    return jax.tree.map(
        lambda x: "".join(letter if size > 1 else WHOLE for letter, size in zip(cut, x.shape, strict=True)), head
    )


def shared_axes(layout: Layout, cfg: ModelConfig) -> tuple[str, ...]:
    """The axes that cut rows and D of the head: the loss cuts the vocabulary over them instead. None where it does not divide.

    A head that is gathered whole takes its own size and, for its gradient in float32, twice that on every device. Here the rows of a chunk are
    gathered in its place: less memory, and less traffic as long as the axes have fewer rows in all than the vocabulary has entries.
    """
    axes = layout.axes("D")
    return axes if cfg.vocab % layout.size(layout.axes("V") + axes) == 0 else ()


def _loss_letters(cfg: ModelConfig, shared: tuple[str, ...]) -> str:
    """How a head enters the loss: as it is stored where the loss itself turns it, else as `head_letters`."""
    letters = "VD" if cfg.tied else "DV"
    return letters if shared else letters.replace("D", WHOLE)


def _by_vocabulary(head: jax.Array, cfg: ModelConfig, axes: tuple[str, ...]) -> jax.Array:
    """From a part of D to a part of V; each device sends what others need and nothing else."""
    vocab = 0 if cfg.tied else 1
    return jax.lax.all_to_all(head, axes, split_axis=vocab, concat_axis=1 - vocab, tiled=True) if axes else head


def rows_at_once(chunk: int, layout: Layout, cfg: ModelConfig, shared: tuple[str, ...]) -> int:
    """A device's rows of a chunk. Where rows are gathered, logits and gathered rows together take what the logits of `chunk` rows would."""
    if not shared:
        return chunk
    vocab, gathered = cfg.vocab // layout.size(layout.axes("V")), layout.size(shared) * cfg.width
    return 1 << (max(1, chunk * vocab // (vocab + gathered)).bit_length() - 1)


def _whole(tree: Any) -> Any:
    return jax.tree.map(lambda x: WHOLE * x.ndim, tree)
