"""Examples in docstrings are right."""

import doctest
import importlib

import pytest

MODULES = ("lmeff.core.numerics", "lmeff.plan.bytes", "lmeff.plan.flops", "lmeff.plan.sizing")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
