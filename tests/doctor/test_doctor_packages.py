"""What the doctor says of Python and its packages, on installations that are made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmeff.doctor import packages
from lmeff.doctor.packages import Package

JAX = (
    "jaxlib<=0.10.2,>=0.10.1",
    "numpy>=2.0",
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
    'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
    'jax-rocm7-plugin==0.10.2.*; extra == "rocm7-local"',
)


def installed(**changes):
    """A machine on which all is well, with other versions (None: not installed) by name."""
    versions = dict.fromkeys(packages.NEEDED, "1.0") | {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    versions |= {"numpy": "2.4.6"} | {name.replace("_", "-"): version for name, version in changes.items()}
    requires = {"jax": JAX, "flax": ("jax>=0.10.0", 'pytest; extra == "testing"')}
    return {name: Package(v, requires.get(name, ())) for name, v in versions.items() if v is not None}


def test_a_machine_on_which_all_is_well():
    assert packages.packages(installed()).ok
    assert packages.plugins(installed(), ()).ok
    assert packages.packages(packages.read_installed()).level in ("ok", "look")  # this one


def test_versions_below_the_oldest_that_jax_takes_are_fine_to_its_minimum():
    assert packages.packages(installed(jaxlib="0.10.1")).ok


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"jaxlib": "0.10.0"}, "FAIL", "jax 0.10.2 needs jaxlib<=0.10.2,>=0.10.1, found 0.10.0"),
        ({"jaxlib": "0.10.3"}, "FAIL", "found 0.10.3"),
        ({"jaxlib": "0.11.2"}, "FAIL", "segmentation fault"),
        ({"numpy": "1.26.4"}, "FAIL", "jax 0.10.2 needs numpy>=2.0, found 1.26.4"),
        ({"jax": "0.9.1"}, "FAIL", "flax 0.12.8 needs jax>=0.10.0, found 0.9.1"),
        ({"optax": None}, "FAIL", "optax not installed"),
        ({"jax": "0.11.1", "jaxlib": "0.10.2"}, "look", "MutableHiType"),
        ({"jax": "0.11.2", "jaxlib": "0.10.2", "flax": "0.12.9"}, "look", "HiPrimitive"),
    ],
    ids=["jaxlib_old", "jaxlib_new", "jaxlib_crashes", "numpy_old", "flax_new", "absent", "flax_0.12.8", "flax_0.12.9"],
)
def test_packages_that_do_not_go_together_are_told_with_a_remedy(changes, level, words):
    check = packages.packages(installed(**changes))
    assert check.level == level
    assert words in check.found
    assert "pip install --upgrade" in check.remedy


@pytest.mark.parametrize(
    ("jax", "flax", "ok"),
    [("0.11.0", "0.12.8", True), ("0.11.1", "0.12.9", True), ("0.11.2", "0.12.10", True), ("0.11.1", "0.12.8", False)],
)
def test_known_pairs_end_where_they_were_mended(jax, flax, ok):
    found = {"jax": Package(jax), "flax": Package(flax)}
    assert any(packages.applies(bad, found) for bad in packages.KNOWN_BAD) is not ok


def test_every_known_pair_says_where_it_is_known_from():
    assert all(len(bad.source) > 20 and bad.remedy.startswith("pip install") for bad in packages.KNOWN_BAD)


@pytest.mark.parametrize(
    ("plugin", "version", "hardware", "level"),
    [
        ("libtpu", "0.0.42.1", ["TPU"], "ok"),
        ("libtpu", "0.0.48", ["TPU"], "FAIL"),
        ("libtpu", "0.0.48", [], "look"),
        ("jax-cuda13-plugin", "0.10.1", ["NVIDIA"], "FAIL"),
        ("jax-cuda13-pjrt", "0.10.1", ["NVIDIA"], "FAIL"),
        ("jax-cuda13-plugin", "0.10.2", ["NVIDIA"], "ok"),
        ("jax-rocm7-plugin", "0.9.1", ["AMD"], "FAIL"),
        ("jax-rocm7-plugin", "0.10.2.1", ["AMD"], "ok"),
        ("jax-metal-plugin", "0.1.1", [], "ok"),  # JAX says nothing of it
    ],
)
def test_plugins_must_belong_to_the_installed_jax(plugin, version, hardware, level):
    check = packages.plugins(installed() | {plugin: Package(version)}, hardware)
    assert check.level == level
    assert f"{plugin} {version}" in check.found
    assert (f"pip install '{plugin}" in check.remedy) is not check.ok


@pytest.mark.parametrize(("version", "level"), [((3, 10, 14), "FAIL"), ((3, 11, 0), "ok"), ((3, 14, 0), "ok")])
def test_python(version, level):
    assert packages.python(version).level == level


@pytest.mark.parametrize(("absent", "level"), [("jinja2", "look"), ("gcsfs", "ok")])
def test_extras(absent, level):
    modules = [module for needed in packages.EXTRAS.values() for module in needed]
    check = packages.extras({module: module != absent for module in modules})
    assert check.level == level
    assert (
        next(extra for extra, needed in packages.EXTRAS.items() if absent in needed) in check.found.split("absent")[1]
    )


def test_a_file_that_stands_before_a_package_is_named():
    check = packages.shadowed({"jax": (Path("/home/me/jax.py"), Path("/venv/jax"))})
    assert check.level == "look"
    assert "/home/me/jax.py" in check.found
    assert packages.shadowed({"jax": (Path("/venv/jax/__init__.py"), Path("/venv/jax"))}).ok
    assert packages.shadowed(packages.origins()).ok  # here


def test_the_command_tells_what_is_wrong_where_jax_cannot_be_imported(tmp_path):
    (tmp_path / "jax").mkdir()
    told = "jaxlib version 9.9 is newer than and incompatible with jax version 0.10.2"
    (tmp_path / "jax" / "__init__.py").write_text(f"raise RuntimeError({told!r})\n")
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "lmeff.start", "doctor"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"lmeff cannot start: RuntimeError: {told}" in done.stderr
    assert str(tmp_path / "jax" / "__init__.py") in done.stderr
    assert "-> rename it, or unset PYTHONPATH" in done.stderr
    assert "Traceback" not in done.stderr
