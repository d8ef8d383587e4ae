"""What commands have in common in what they read and refuse."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro

from lmeff.core.errors import UsageError
from lmeff.core.precision import DTYPES
from lmeff.data.tokenizer import Tokenizer
from lmeff.parallel.mesh import MeshPlan
from lmeff.recipe.open import OpenModel


def refuse_unknown(arguments: Sequence[str], command: str) -> None:
    """Raises `UsageError` for words that no option took."""
    if arguments:
        raise UsageError(
            f"lmeff {command}: unknown arguments {list(arguments)}; expected those that `lmeff {command} --help` lists"
        )


def dtype_of(name: str | None) -> Any:
    """The dtype that --dtype names, None where none is."""
    if name is None:
        return None
    if name not in DTYPES:
        raise UsageError(f"--dtype: got '{name}', expected one of {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name])


def need_tokenizer(opened: OpenModel, path: Path) -> Tokenizer:
    """The model's tokenizer; raises `UsageError` where it has none."""
    if opened.tokenizer is None:
        raise UsageError(
            f"{path}: has no tokenizer, expected one for text. Import the model with --tokenizer, or put the tokenizer's files into its folder."
        )
    return opened.tokenizer


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What is left of an experiment's settings where there is no run."""

    mesh: MeshPlan = MeshPlan()  # noqa: RUF009 -- frozen


def mesh_of(overrides: Sequence[str], prog: str) -> MeshPlan:
    """The mesh that --mesh.* options name; tyro refuses all others (exit code 2)."""
    return tyro.cli(Placed, prog=prog, args=list(overrides)).mesh
