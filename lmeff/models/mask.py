"""What attention may see."""

from typing import NamedTuple


class Mask(NamedTuple):
    """What a query may see, besides no later token: tokens of its own document, within a window; scores may be capped."""

    window: int | None
    softcap: float | None
