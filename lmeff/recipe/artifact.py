"""An artifact: a model at rest. What every stage of a recipe takes and makes."""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.compress.base import Compression, State, identity
from lmeff.compress.config import build
from lmeff.core.ops import FLOATING, Numerics
from lmeff.core.specs import abstract
from lmeff.models.config import ModelConfig, read
from lmeff.models.transformer import identity_view, param_specs
from lmeff.parallel.mesh import Layout
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.runtime import Model
from lmeff.train.state import with_shardings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is static of an artifact and comes from its stage: with it and `cfg`, the arrays' shapes follow."""

    transforms: tuple[Any, ...] = ()
    numerics: Numerics = FLOATING
    packed: bool = False

    @property
    def compression(self) -> Compression:
        """The transforms of the raw weights; a packed artifact has none left to apply."""
        return identity() if self.packed else build(self.transforms)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model at rest: its shape, its weights, and how they are compressed.

    params:  raw weights, or packed leaves.
    state:   the state of the compression that turns raw weights into what the forward pass sees.
    ranges:  calibrated activation ranges, or None.
    details: JSON-able facts about its making: parents, seconds, tokens, learning curve.
    """

    name: str
    cfg: ModelConfig
    recipe: Recipe
    params: Any
    state: State
    ranges: Any = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The model as a step runs it."""
        view = identity_view if self.recipe.packed else self.recipe.compression.apply
        return Model(self.cfg, self.recipe.numerics, view)

    def effective(self) -> Any:
        """The weights as the forward pass sees them."""
        return self.params if self.recipe.packed else jax.jit(self.recipe.compression.apply)(self.params, self.state)

    @property
    def at_hand(self) -> bool:
        """Whether its arrays are here, and not on disk alone."""
        return self.params is not None

    def at_rest(self) -> "Artifact":
        """Without its arrays, which are saved: what later stages must know of it even where they do not read it."""
        return dataclasses.replace(self, params=None, state=State({}, {}), ranges=None)

    def export(self) -> "Artifact":
        """The packed model: integer codes and scales, and the other weights as the forward pass saw them."""
        packed = jax.jit(self.recipe.compression.export)(self.params, self.state)
        recipe = dataclasses.replace(self.recipe, packed=True)
        return dataclasses.replace(self, recipe=recipe, params=packed, state=State({}, {}))


def save(artifact: Artifact, directory: Path) -> None:
    """Writes the arrays and what is needed to read them back; complete or not at all."""
    arrays = {"params": artifact.params, "state": artifact.state, "ranges": artifact.ranges or {}}
    metadata = {"cfg": dataclasses.asdict(artifact.cfg), "details": artifact.details}
    with Checkpointer(directory, keep=1) as checkpointer:
        checkpointer.save(0, arrays, metadata)


def load(name: str, recipe: Recipe, directory: Path, layout: Layout, dtype: Any) -> Artifact:
    """Reads an artifact back onto a mesh, whatever mesh wrote it."""
    with Checkpointer(directory, keep=1) as checkpointer:
        metadata = checkpointer.metadata()
        cfg = read(metadata["cfg"])
        arrays, _ = checkpointer.restore(abstract_arrays(cfg, recipe, layout, dtype))
    return Artifact(
        name=name,
        cfg=cfg,
        recipe=recipe,
        params=arrays["params"],
        state=arrays["state"],
        ranges=arrays["ranges"] or None,
        details=metadata["details"],
    )


def abstract_arrays(cfg: ModelConfig, recipe: Recipe, layout: Layout, dtype: Any) -> dict[str, Any]:
    """The arrays of an artifact as specs with shardings: known before any weight exists."""
    params, state = _shapes(cfg, recipe, dtype)
    arrays = with_shardings({"params": params, "state": state}, param_specs(cfg), layout)
    return {**arrays, "ranges": abstract_ranges(cfg, recipe, layout)}


def abstract_ranges(cfg: ModelConfig, recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Its calibrated activation ranges: float32 [L, 2] (low, high), and [2] for the head; none where every format is found on the fly."""
    return {
        site: jax.ShapeDtypeStruct(_range_shape(site, cfg), jnp.float32, sharding=layout.replicated)
        for site in recipe.numerics.static_sites
    }


def abstract_effective(cfg: ModelConfig, recipe: Recipe, layout: Layout, dtype: Any) -> Any:
    """`Artifact.effective` as specs with shardings."""
    return with_shardings(_effective(cfg, recipe, dtype), param_specs(cfg), layout)


# The same for every mesh: a search asks for hundreds.
@functools.lru_cache(maxsize=64)
def _shapes(cfg: ModelConfig, recipe: Recipe, dtype: Any) -> tuple[Any, State]:
    specs, compression = param_specs(cfg), build(recipe.transforms)
    params = abstract(specs, dtype)
    state = jax.eval_shape(lambda p: compression.init(p, specs), params)
    if not recipe.packed:
        return params, state
    return jax.eval_shape(compression.export, params, state), State({}, {})


@functools.lru_cache(maxsize=64)
def _effective(cfg: ModelConfig, recipe: Recipe, dtype: Any) -> Any:
    return jax.eval_shape(recipe.compression.apply, *_shapes(cfg, recipe, dtype))


def _range_shape(site: str, cfg: ModelConfig) -> tuple[int, ...]:
    return (2,) if site == "head" else (cfg.layers, 2)
