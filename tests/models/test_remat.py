"""Remat policies by name: what is read, and what is refused before anything is traced."""

import pytest

from lmeff.core.errors import ConfigError
from lmeff.models.config import ModelConfig
from lmeff.models.remat import FIXED, Remat, parse
from lmeff.models.transformer import sites

SITES = sites(ModelConfig())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        *FIXED.items(),
        ("save:attn_out,attn.q", Remat("save", ("attn_out", "attn.q"))),
        ("offload:mlp_hidden", Remat("offload", ("mlp_hidden",))),
        ("budget:6GiB", Remat("budget", budget=6 * 2**30)),
        ("budget:1.5MiB", Remat("budget", budget=3 * 2**19)),
    ],
)
def test_reads(text, want):
    assert parse(text, SITES) == want


@pytest.mark.parametrize(
    "text", ["some", "save", "save:", "save:attn.x", "offload:attn_out,", "budget:6", "budget:GiB", "save:head", ""]
)
def test_refuses(text):
    with pytest.raises(ConfigError, match=f"train.remat: got '{text}', expected none, dots, names, full, budget:SIZE"):
        parse(text, SITES)
