"""Examples in docstrings are right."""

import doctest
import importlib

import pytest

PLAN = ("bytes", "flops", "limits", "serving", "sizing", "storage")
MODULES = ("lmeff.core.numerics", *(f"lmeff.plan.{name}" for name in PLAN))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
