"""What a forward pass does, product by product: counted by running the model's own `forward` on shapes alone, behind a seam that counts.

FLOPs of a product are twice the product of its distinct letters, bytes are those of its operands as the code has them. So a change of the model is a
change of the count. Cost grows by rows in proportion: one row is traced, once for a model and a length.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.compress.config import Prune, build, parse_pattern, pruned
from lmeff.core.batch import Batch
from lmeff.core.dims import matmul_flops, split_einsum
from lmeff.core.exchange import ALONE, ExpertLayer, Routed
from lmeff.core.numerics import is_qtensor
from lmeff.core.ops import Ops, Products, Ranges, Scope
from lmeff.core.packed import are_integers
from lmeff.core.precision import Policy
from lmeff.core.specs import abstract
from lmeff.core.tree import flatten, map_with_path
from lmeff.models.config import ModelConfig
from lmeff.models.cost import mean_over_layers
from lmeff.models.moe import row_capacity
from lmeff.models.transformer import forward, param_specs, project
from lmeff.plan.estimate import Site
from lmeff.plan.job import Shape
from lmeff.plan.storage import bits_of


@functools.lru_cache(maxsize=4096)
def sites(
    shape: Shape,
    rows: int,
    tokens: int,
    *,
    policy: Policy = Policy(),  # noqa: B008 -- frozen
    accumulate: int = 1,
) -> tuple[Site, ...]:
    """The work of a forward pass over `rows` rows of `tokens` tokens, all layers and devices together, in the order of the code.

    shape:      its weights may be packed.
    accumulate: microbatches, each of which reads the weights.

    Of experts the rows that are multiplied count: without a capacity those of every token's `top_k`, with one every slot, filled or not (`filled`).
    Elementwise work (norms, rotations, softmax, gates) is not counted, nor is the padding of rows to whole blocks.
    """
    return tuple(_scaled(site, rows, accumulate) for site in _one_row(shape, tokens, policy))


def filled(cfg: ModelConfig, site: str, tokens: int) -> float:
    """The share of a site's rows that hold a token where tokens spread evenly: less than 1 in experts whose capacity leaves room."""
    moe = cfg.moe
    if moe is None or moe.capacity is None or not site.startswith("moe.") or site == "moe.router":
        return 1.0
    return min(1.0, tokens * moe.top_k / (moe.experts * row_capacity(moe, tokens)))


def density(shape: Shape) -> dict[str, float]:
    """The share of each pruned weight that is left at the end of training, by path; of several masks the sparsest counts.

    Masks that rank all weights together (`scope="global"`) are taken to prune every weight alike.
    """
    specs, left = param_specs(shape.cfg), dict[str, float]()
    for transform in shape.recipe.transforms:
        if isinstance(transform, Prune):
            pattern = parse_pattern(transform.pattern)
            own = 1 - (transform.sparsity or 0.0) if pattern is None else pattern[0] / pattern[1]
            left |= {path: min(own, left.get(path, 1.0)) for path in pruned((transform,), specs)}
    return left


def _scaled(site: Site, rows: int, accumulate: int) -> Site:
    """From one row to all; weights are read once a microbatch, but of a table the rows that are looked up."""
    times = {"activation": rows, "weight": rows if site.kind == "lookup" else accumulate}
    reads = {name: size * times[name] for name, size in site.reads.items()}
    return site._replace(flops=site.flops * rows, reads=reads, writes=site.writes * rows)


@functools.lru_cache(maxsize=1024)
def _one_row(shape: Shape, tokens: int, policy: Policy) -> tuple[Site, ...]:
    counter = _Counter(shape, tokens)

    def run(params: Any, ids: Any) -> None:
        counter.name(params)
        batch = Batch(ids, ids, ids, ids, jnp.ones(ids.shape, jnp.float32))
        dtypes = {"compute_dtype": policy.compute, "output_dtype": policy.output}
        out = forward(params, batch, shape.cfg, make_ops=counter.open, scan=counter.scan, **dtypes)
        project(out.hidden_BTD, out.head, shape.cfg, counter.open({}).ops)

    jax.eval_shape(run, _weights(shape, policy), jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    return tuple(counter.found.values())


def _weights(shape: Shape, policy: Policy) -> Any:
    """Shapes of the weights as products see them: in the compute dtype but for routers, or packed."""
    specs = param_specs(shape.cfg)

    def leaf(path: str, x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, policy.params if path.endswith("/router") else policy.compute)

    if not shape.recipe.packed:
        return map_with_path(leaf, abstract(specs))
    packed = flatten(_packed(shape))
    return map_with_path(lambda path, x: packed[path] if is_qtensor(packed[path]) else leaf(path, x), abstract(specs))


def _packed(shape: Shape) -> Any:
    compression, specs = build(shape.recipe.transforms), param_specs(shape.cfg)
    return jax.eval_shape(lambda p: compression.export(p, compression.init(p, specs)), abstract(specs))


class _Counter:
    """A seam that computes nothing: every operation notes what it would cost and gives zeros of the right shape."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.cfg, self.numerics, self.tokens = shape.cfg, shape.recipe.numerics, tokens
        self.left = density(shape)
        self.found: dict[str, Site] = {}
        self.layers = 1  # of what is traced now
        self.paths: dict[int, str] = {}
        self.alive: list[Any] = []  # an id means something as long as its object lives

    def name(self, tree: Any, prefix: str = "") -> None:
        """Notes which parameter each leaf is."""
        self.alive.append(tree)
        self.paths |= {id(leaf): prefix + path for path, leaf in flatten(tree).items()}

    def open(self, ranges: Ranges) -> Scope:
        """A `MakeOps`."""
        ignored = lambda name, x: None  # noqa: E731
        ops = Ops(self.einsum, self.experts, self.attend, lambda x, letters: x, self.embed, ignored, ignored)
        return Scope(ops, dict)

    def scan(self, step: Any, carry: Any, layers: Any, *, unroll: int) -> Any:
        """`jax.lax.scan` over layers that are all alike: one of them, noted as many times as there are."""
        self.layers = jax.tree.leaves(layers)[0].shape[0]
        first = jax.tree.map(lambda x: jax.lax.index_in_dim(x, 0, keepdims=False), layers)
        self.name(first[0], "blocks/")
        carry, records = step(carry, first)
        self.layers = 1
        return carry, records

    def einsum(self, equation: str, x: Any, w: Any, *, site: str) -> jax.Array:
        """An `Einsum`."""
        left, right, out = split_einsum(equation)
        sizes = dict(zip(left + right, (*x.shape, *w.shape), strict=True))
        made = jnp.zeros([sizes[letter] for letter in out], x.dtype)
        self.product(site, equation, matmul_flops(equation, sizes), x, w, made)
        return made

    def grouped(self, equation: str, x: Any, w: Any, rows: Any, *, site: str) -> jax.Array:
        """A `Grouped`: of the buffer, only the rows that have a token."""
        assert self.cfg.moe is not None
        active = self.tokens * self.cfg.moe.top_k
        left, right, out = split_einsum(equation)
        made = jnp.zeros((x.shape[0], w.shape[right.index(out[1])]), x.dtype)
        sizes = dict(zip(left + right, (active, x.shape[1], 1, *w.shape[1:]), strict=True))  # a row meets one expert
        used = (jax.ShapeDtypeStruct((active, y.shape[1]), y.dtype) for y in (x, made))
        self.product(site, equation, matmul_flops(equation, sizes), next(used), w, next(used))
        return made

    def experts(self, layer: ExpertLayer, x_BTD: Any, batch: Batch, weights: Any, *, reveal: bool = False) -> Routed:
        """An `Experts`."""
        return layer.run(x_BTD, batch, weights, Products(self.einsum, self.grouped), ALONE, reveal)

    def product(self, site: str, equation: str, flops: int, x: Any, w: Any, made: Any) -> None:
        """Notes a product."""
        format = self.numerics.at(site)
        whole = is_qtensor(w) and format is not None and are_integers(format, w.format)  # codes times codes
        reads = {"activation": x.size if whole else _bytes(x), "weight": _bytes(w)}
        dense = self.left.get(self.paths[id(w)], 1.0)
        arithmetic = "int8" if whole else jnp.dtype(x.dtype).name
        self.note(Site(site, "product", equation, 1, float(flops), 1.0, dense, reads, _bytes(made), arithmetic))

    def attend(self, q: Any, k: Any, v: Any, segments: Any, **seen: Any) -> jax.Array:
        """Scores and values of every query with every key; the part that is seen is the mean over layers, which may differ in it."""
        flops = 4.0 * q.size * k.shape[1]
        visible = mean_over_layers(self.cfg, self.tokens) / self.tokens
        reads = {"activation": _bytes(q) + _bytes(k) + _bytes(v), "weight": 0.0}
        format = jnp.dtype(q.dtype).name
        self.note(Site("attention", "attention", "", 1, flops, visible, 1.0, reads, _bytes(q), format))
        return jnp.zeros(q.shape, q.dtype)

    def embed(self, table: Any, ids: Any) -> jax.Array:
        """Rows of a table: read and written, nothing multiplied."""
        dtype = table.dtype
        made = jnp.zeros((*ids.shape, table.shape[1]), dtype)
        read = _bytes(table) * ids.size / table.shape[0]
        reads = {"activation": 0.0, "weight": read}
        dense = self.left.get(self.paths[id(table)], 1.0)
        self.note(Site("embed", "lookup", "", 1, 0.0, 1.0, dense, reads, _bytes(made), jnp.dtype(dtype).name))
        return made

    def note(self, site: Site) -> None:
        """Keeps what one layer does as that of all of them."""
        times = self.layers
        reads = {name: size * times for name, size in site.reads.items()}
        self.found[site.name] = site._replace(
            layers=times, flops=site.flops * times, reads=reads, writes=site.writes * times
        )


def _bytes(x: Any) -> float:
    """Bytes of an array or of all parts of a packed one; codes of 4 bits take half a byte."""
    return sum(math.prod(part.shape) * bits_of(part.dtype) / 8 for part in jax.tree.leaves(x))
