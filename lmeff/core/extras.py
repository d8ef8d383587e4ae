"""Optional dependencies: imported where they are used, with a remedy when they are absent."""

import importlib
from types import ModuleType

from lmeff.core.errors import MissingExtra


def require(module: str, *, extra: str) -> ModuleType:
    """Imports `module`, which `pip install 'lmeff[extra]'` provides; raises `MissingExtra` where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the package '{module.partition('.')[0]}', which is not installed; pip install 'lmeff[{extra}]'"
        ) from error
