"""Python and the packages: what their own metadata asks for, and pairs that are known to break.

Nothing here imports JAX, so that `python -m lmeff` can say what is wrong where JAX cannot be imported.
"""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lmeff
from lmeff.doctor.check import Check, Level, Problem, judge

MINIMUM = (3, 11)
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
NEEDED = (*SHOWN, "tyro", "rich", "cattrs", "scipy", "ml-dtypes")
IMPORTED = ("jax", "jaxlib", "flax", "optax", "numpy")
EXTRAS = {
    "report": ("matplotlib", "jinja2"),
    "text": ("tokenizers", "sentencepiece"),
    "gguf": ("gguf",),
    "eval": ("lm_eval",),
    "parquet": ("pyarrow",),
    "hf": ("datasets",),
    "remote": ("fsspec", "gcsfs"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


class Package(NamedTuple):
    """An installed distribution: its version and the requirements in its metadata."""

    version: str
    requires: tuple[str, ...] = ()


class KnownBad(NamedTuple):
    """Packages that break in these versions, all of them together. source: where it is told, or what shows it."""

    versions: Mapping[str, str]
    level: Level
    why: str
    remedy: str
    source: str


Installed = Mapping[str, Package]


def read_installed() -> dict[str, Package]:
    """What is needed of what is installed, and every plugin of JAX, by canonical name."""
    found = {canonicalize_name(d.metadata["Name"] or ""): d for d in importlib.metadata.distributions()}
    wanted = [name for name in found if name in NEEDED or is_plugin(name)]
    return {name: Package(found[name].version, tuple(found[name].requires or ())) for name in wanted}


def is_plugin(name: str) -> bool:
    """Whether a distribution brings JAX a platform: libtpu, jax-cuda13-plugin, jax-rocm7-pjrt, ..."""
    return name == "libtpu" or (name.startswith("jax-") and name.endswith(("-plugin", "-pjrt")))


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Python's version."""
    problem = Problem("FAIL", "too old", "install Python 3.11 or newer: lmeff needs it")
    return judge("python", ".".join(map(str, version)), [] if version[:2] >= MINIMUM else [problem])


def packages(installed: Installed) -> Check:
    """Whether all packages are there, in versions that take each other."""
    versions = ", ".join(f"{name} {installed[name].version}" for name in SHOWN if name in installed)
    absent = [name for name in NEEDED if name not in installed]
    problems = [Problem("FAIL", f"{', '.join(absent)} not installed", "pip install --upgrade lmeff")] if absent else []
    problems += list(unmet(installed))
    problems += [Problem(bad.level, bad.why, bad.remedy) for bad in KNOWN_BAD if applies(bad, installed)]
    return judge("packages", versions, problems)


def unmet(installed: Installed) -> Iterator[Problem]:
    """Requirements that an installed package has of another and that its version does not meet; those of extras are left out."""
    for name, package in installed.items():
        for wanted in map(Requirement, package.requires):
            needed = canonicalize_name(wanted.name)
            if needed in installed and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                got = installed[needed].version
                if not wanted.specifier.contains(got, prereleases=True):
                    told = f"{name} {package.version} needs {needed}{wanted.specifier}, found {got}"
                    yield Problem("FAIL", told, "pip install --upgrade jax jaxlib lmeff, in one command")


def applies(bad: KnownBad, installed: Installed) -> bool:
    """Whether these are the versions that are installed."""
    wanted = {name: Requirement(f"{name}{versions}").specifier for name, versions in bad.versions.items()}
    return all(
        name in installed and versions.contains(installed[name].version, prereleases=True)
        for name, versions in wanted.items()
    )


def plugins(installed: Installed, hardware: Sequence[str]) -> Check:
    """Whether what brings JAX a platform belongs to the installed JAX, by JAX's own metadata. hardware: kinds that are here, such as "TPU"."""
    there = {name: package.version for name, package in installed.items() if is_plugin(name)}
    problems = []
    for name, version in there.items():
        allowed = wanted_plugin(name, installed)
        if allowed is not None and not allowed.specifier.contains(version, prereleases=True):
            used = any(_serves(name, kind) for kind in hardware)
            told = (
                f"{name} {version} does not belong to jax {installed['jax'].version}, which wants {allowed.specifier}"
            )
            remedy = f"pip install '{name}{allowed.specifier}'"
            problems.append(Problem("FAIL" if used else "look", told, remedy))
    told = ", ".join(f"{name} {version}" for name, version in sorted(there.items()))
    return judge("plugins", told or "none, JAX runs on the CPU", problems)


def wanted_plugin(name: str, installed: Installed) -> Requirement | None:
    """What JAX asks of a plugin in its extras, None where it names none. What a plugin brings along has the plugin's own version."""
    named = name.replace("-pjrt", "-plugin")
    asked = map(Requirement, installed["jax"].requires if "jax" in installed else ())
    return next((wanted for wanted in asked if canonicalize_name(wanted.name) == named), None)


def _serves(plugin: str, kind: str) -> bool:
    return {"TPU": "libtpu", "NVIDIA": "cuda", "AMD": "rocm"}[kind] in plugin


def extras(find: Mapping[str, bool] | None = None) -> Check:
    """Which optional packages are there. find: whether a module can be imported, by name."""
    modules = [module for needed in EXTRAS.values() for module in needed]
    there = {name: importlib.util.find_spec(name) is not None for name in modules} if find is None else find
    missing = [extra for extra, needed in EXTRAS.items() if not all(there[module] for module in needed)]
    told = ", ".join(extra for extra in EXTRAS if extra not in missing) or "none"
    found = f"installed: {told}" + (f"; absent: {', '.join(missing)}" if missing else "")
    problem = Problem("look", "no HTML report, and `lmeff run` wants one", "pip install 'lmeff[report]'")
    return judge("extras", found, [problem] if "report" in missing else [])


def origins() -> dict[str, tuple[Path, Path]]:
    """(where it is imported from, where pip put it) of packages that are often doubled, by name."""
    found = {}
    for name in IMPORTED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            package = importlib.metadata.distribution(name)
            found[name] = (Path(spec.origin).resolve(), Path(str(package.locate_file(name))).resolve())
    return found


def shadowed(found: Mapping[str, tuple[Path, Path]]) -> Check:
    """Whether a file of yours or a folder on PYTHONPATH stands before an installed package."""
    other = {name: got for name, (got, wanted) in found.items() if got.parent != wanted}
    problems = [
        Problem("look", f"{name} comes from {got}, not from the installed package", "rename it, or unset PYTHONPATH")
        for name, got in other.items()
    ]
    place = Path(lmeff.__file__).parents[1]
    return judge("imports", f"lmeff {lmeff.__version__} from {place}, packages from {sys.prefix}", problems)


def diagnosis(error: BaseException) -> str:
    """What to tell where the command line cannot even be imported."""
    try:
        checks = [python(), packages(read_installed()), shadowed(origins())]
    except Exception as further:  # whatever is broken, the first error is the one to tell
        checks = [Check("packages", "FAIL", f"{type(further).__name__}: {further}", "pip install --upgrade lmeff")]
    told = [f"  {check.name}: {check.found}\n    -> {check.remedy}" for check in checks if not check.ok]
    known = told or ["  nothing known; report it with the versions that `pip freeze` lists"]
    where = f"Python {platform.python_version()} in {sys.prefix}"
    return "\n".join([f"lmeff cannot start: {type(error).__name__}: {error}", f"  {where}", *known])


_FLAX = "pip install --upgrade flax"
KNOWN_BAD = (
    KnownBad(
        {"jaxlib": "==0.11.2"},
        "FAIL",
        "jaxlib 0.11.2 ends with a segmentation fault on gradients of sharded programs",
        "pip install --upgrade 'jax!=0.11.2'",
        "seen with lmeff's own tests under this version alone: Shardy simplifies the gradient of a jax.shard_map with unused inputs",
    ),
    KnownBad(
        {"flax": "<0.12.9", "jax": ">=0.11.1"},
        "look",
        "flax.nnx cannot be imported with this jax, which has no MutableHiType (lmeff does without flax.nnx)",
        _FLAX,
        "https://github.com/marimo-team/marimo/pull/10646",
    ),
    KnownBad(
        {"flax": "==0.12.9", "jax": ">=0.11.2"},
        "look",
        "flax.nnx cannot be imported with this jax, which has no HiPrimitive (lmeff does without flax.nnx)",
        _FLAX,
        "https://github.com/google/flax/issues/5596",
    ),
)
