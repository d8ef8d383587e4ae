"""What commands have in common in what they refuse."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lmeff.core.errors import UsageError
from lmeff.core.precision import DTYPES


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
