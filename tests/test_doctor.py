"""The doctor's judgement of what is installed."""

import importlib.metadata

import pytest

from lmeff import doctor


@pytest.mark.parametrize(("jaxlib", "ok"), [("0.11.1", True), ("0.11.2", False), ("0.12.0", True)])
def test_packages_that_crash_are_told_with_a_remedy(monkeypatch, jaxlib, ok):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: jaxlib if name == "jaxlib" else real(name))
    check = doctor._packages()
    assert check.ok is ok
    assert f"jaxlib {jaxlib}" in check.found
    assert ("pip install --upgrade jax" in check.remedy) is not ok
