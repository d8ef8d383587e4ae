"""Compression of weights as an algebra of transforms, in the manner of optax.

A `Compression` is five pure functions over parameter trees. It is closed under `chain` and `only`; its state is arrays, so jit,
sharding and checkpoints come free. Leaf functions address dims from the right, so that the same code runs on a leaf stacked over
layers, on one layer of it inside the scan, and on whatever other leading dims (experts) may come.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec, Rules, resolve
from lmeff.core.tree import Tree, flatten, merge, select, unflatten

Params = Any
Packed = Any


class State(NamedTuple):
    """A transform's state. Both parts mirror the parameter tree and hold only the leaves that the transform acts on.

    trainable: differentiated and given to the optimizer (learned scales, low-rank factors).
    auxiliary: the rest (masks, calibrated scales); each entry is a pytree whose static fields say how to treat the leaf.
    """

    trainable: Any
    auxiliary: Any


class Compression(NamedTuple):
    """A transform of the weights.

    init:   `(params, specs) -> State`. Runs under `jax.eval_shape`: no device needed.
    apply:  `(params, state) -> params`, in the loss. Keeps structure, shape, dtype and sharding; leaf-local.
    update: `(params, grads, state, step) -> auxiliary`, once a step, outside the gradient. May look globally.
    export: `(params, state) -> packed`, once, outside training. Leaves become `QTensor`s, or stay arrays.
    packs:  whether `export` makes leaves that no other transform can act on; such a member comes last in a chain.
    """

    init: Callable[[Params, Tree], State]
    apply: Callable[[Params, State], Params]
    update: Callable[[Params, Any, State, Any], Any]
    export: Callable[[Params, State], Packed]
    packs: bool = False


class LeafTransform(NamedTuple):
    """A transform of one weight: what a new method has to write.

    init:   `(w, spec) -> (trainable, auxiliary)`; None for a part it does not have. `auxiliary` must not be None.
    apply:  `(w, trainable, auxiliary) -> w`.
    update: `(w, grad, trainable, auxiliary, step) -> auxiliary`.
    export: `(w, trainable, auxiliary) -> leaf`.
    """

    init: Callable[[Any, ParamSpec], tuple[Any, Any]]
    apply: Callable[[Any, Any, Any], Any]
    update: Callable[[Any, Any, Any, Any, Any], Any]
    export: Callable[[Any, Any, Any], Any]


class Leaf(NamedTuple):
    """One leaf's entry in a state tree, so that whatever is inside it is never mistaken for a subtree of parameters."""

    value: Any


def per_leaf(transform: LeafTransform, *, packs: bool = False) -> Compression:
    """Lifts a transform of one weight to trees."""

    def init(params: Params, specs: Tree) -> State:
        flat = flatten(specs)
        made = {path: transform.init(w, flat[path]) for path, w in flatten(params).items()}
        trainable = {path: Leaf(t) for path, (t, _) in made.items() if t is not None}
        return State(unflatten(trainable), unflatten({path: Leaf(a) for path, (_, a) in made.items()}))

    def each(params: Params, state: State, fn: Callable[..., Any]) -> dict[str, Any]:
        weights, trainable = flatten(params), flatten(state.trainable)
        return {
            path: fn(path, weights[path], trainable[path].value if path in trainable else None, entry.value)
            for path, entry in flatten(state.auxiliary).items()
        }

    def apply(params: Params, state: State) -> Params:
        return merge(params, unflatten(each(params, state, lambda _, w, t, a: transform.apply(w, t, a))))

    def update(params: Params, grads: Any, state: State, step: Any) -> Any:
        flat = flatten(grads)
        return unflatten(each(params, state, lambda path, w, t, a: Leaf(transform.update(w, flat[path], t, a, step))))

    def export(params: Params, state: State) -> Packed:
        return merge(params, unflatten(each(params, state, lambda _, w, t, a: transform.export(w, t, a))))

    return Compression(init, apply, update, export, packs)


def identity() -> Compression:
    """The neutral element of `chain`."""
    return Compression(
        init=lambda params, specs: State({}, {}),
        apply=lambda params, state: params,
        update=lambda params, grads, state, step: state.auxiliary,
        export=lambda params, state: params,
    )


def only(rules: Rules, compression: Compression, *, where: str = "rules") -> Compression:
    """`compression` on the leaves that `rules` map to True, the identity elsewhere. Rules are total and live.

    Only `init` needs the rules: afterwards the state itself says which leaves are meant.
    """

    def init(params: Params, specs: Tree) -> State:
        table = resolve(rules, flatten(specs), where=where)
        chosen = {path for path, value in table.items() if value}
        return compression.init(select(params, chosen), select(specs, chosen))

    return compression._replace(init=init)


def by_rule(rules: Rules, make: Callable[[Any], Compression], *, where: str = "rules") -> Compression:
    """`make(value)` on the leaves that `rules` give this value; None leaves a leaf alone. The members may differ in `init` only."""
    members = {value: make(value) for _, value in rules if value is not None}

    def init(params: Params, specs: Tree) -> State:
        table = resolve(rules, flatten(specs), where=where)
        trainable: dict[str, Any] = {}
        auxiliary: dict[str, Any] = {}
        for value, member in members.items():
            chosen = {path for path, own in table.items() if own == value}
            made = member.init(select(params, chosen), select(specs, chosen))
            trainable |= flatten(made.trainable)
            auxiliary |= flatten(made.auxiliary)
        return State(unflatten(trainable), unflatten(auxiliary))

    return next(iter(members.values()), identity())._replace(init=init)


def chain(*members: Compression) -> Compression:
    """Applies `members` in order: each sees the weights as those before it made them. Quantization comes last."""
    for position, member in enumerate(members[:-1]):
        if member.packs:
            raise ConfigError(
                f"chain: member {position} of {len(members)} packs the weights (quantization), but others follow it; "
                "a packed weight cannot be masked or changed any more. Put it last."
            )

    def states(state: State) -> list[State]:
        return [State(t, a) for t, a in zip(state.trainable, state.auxiliary, strict=True)]

    def init(params: Params, specs: Tree) -> State:
        made = []
        for member in members:
            made.append(member.init(params, specs))
            params = member.apply(params, made[-1])
        return State(tuple(s.trainable for s in made), tuple(s.auxiliary for s in made))

    def apply(params: Params, state: State) -> Params:
        for member, part in zip(members, states(state), strict=True):
            params = member.apply(params, part)
        return params

    def update(params: Params, grads: Any, state: State, step: Any) -> Any:
        made = []
        for member, part in zip(members, states(state), strict=True):
            made.append(member.update(params, grads, part, step))
            params = member.apply(params, State(part.trainable, made[-1]))
        return tuple(made)

    def export(params: Params, state: State) -> Packed:
        for member, part in zip(members, states(state), strict=True):
            params = member.export(params, part)
        return params

    return Compression(init, apply, update, export, packs=any(member.packs for member in members))
