"""What is wrong with JSON values that should have become dataclasses, in words."""

import cattrs
from cattrs.v import format_exception

from lmeff.core.errors import UserError


def explain(error: cattrs.BaseValidationError, where: str) -> str:
    """All problems in one line, each with its place below `where`."""

    def told(inner: BaseException, kind: type | None) -> str:
        return str(inner) if isinstance(inner, UserError) else format_exception(inner, kind)

    return "; ".join(cattrs.transform_error(error, where, told))
