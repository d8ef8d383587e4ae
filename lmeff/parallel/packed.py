"""Products with packed weights on a mesh: every device multiplies its own parts in the form that the table has for its platform.

Rows stay cut, and outputs as the weight has them. Where the summed dim is cut over devices their products are added. What fsdp cuts is brought whole, as codes.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from lmeff.core.dims import contracted, split_einsum
from lmeff.core.numerics import QTensor, is_qtensor
from lmeff.kernels import table
from lmeff.kernels.table import FORMS, form_of, packed_product, plain
from lmeff.parallel.mesh import WHOLE, Layout, names

Axes = tuple[str, ...]


def packed_on(layout: Layout, equation: str, x: Any, w: QTensor) -> jax.Array | None:
    """`core.ops.Packed` on a layout; None where the plain form is best, whose parts XLA places."""
    if layout.single:
        return packed_product(layout.platform, equation, x, w)
    cuts = cuts_of(layout, equation, x, w)
    if FORMS[form_of(layout.platform, equation, x, w, {c: layout.size(axes) for c, axes in cuts.items()})] is None:
        return None
    left, right, out = split_einsum(equation)
    parts = _parts(layout, cuts, left, x), _parts(layout, cuts, right, w)
    if None in parts:
        plain(f"{layout.platform}: groups of '{w.format}' do not divide over {layout.describe()}")
        return None
    inner = tuple(axis for letter in contracted(equation) for axis in cuts[letter])

    def local(x: Any, w: QTensor) -> Any:
        made = packed_product(layout.platform, equation, x, w)
        return jax.lax.psum(made, inner) if inner else made

    # A Pallas kernel does not say what its results vary over.
    checked = layout.platform != "tpu"
    return layout.on_parts(local, parts, P(*(cuts[c] or None for c in out)), checked=checked)(x, w)


def stored_for(layout: Layout, params: Any) -> Any:
    """Parameters with packed leaves as the forms of one device read them best; on several devices as they lie."""
    if not layout.single:
        return params
    return jax.tree.map(
        lambda x: table.stored_for(layout.platform, x) if is_qtensor(x) else x, params, is_leaf=is_qtensor
    )


def cuts_of(layout: Layout, equation: str, x: Any, w: QTensor) -> dict[str, Axes]:
    """The axes that each letter of a product is cut over: tokens as activations are, T whole over tensor, the weight as it lies but for D."""
    left, right, _ = split_einsum(equation)
    tokens, weight = left.replace("T", "S").replace("D", WHOLE), right.replace("D", WHOLE)
    cuts = dict(zip(left, map(names, layout.partition(tokens, x.shape)), strict=True))
    return cuts | dict(zip(right, map(names, layout.partition(weight, w.shape)), strict=True))


def _parts(layout: Layout, cuts: dict[str, Axes], letters: str, x: Any) -> Any:
    """Partitions of an operand, in its own structure; None where a cut would end inside a group."""
    if not is_qtensor(x):
        return P(*(cuts[c] or None for c in letters))

    def shared(scale: Any) -> Any:
        return (
            None if scale is None else P(*(None if n == 1 else cuts[c] or None for c, n in zip(letters, scale.shape)))
        )

    if x.format.group is not None:
        letter, size = letters[x.axes[-1]], x.shape[x.axes[-1]]
        ways = layout.size(cuts[letter])
        if ways > 1 and size % (ways * x.format.group):
            return None
    return QTensor(P(*(cuts[c] or None for c in letters)), shared(x.scale), shared(x.zero), x.format, x.axes, x.dtype)
