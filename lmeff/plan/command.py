"""`lmeff plan`: what a config needs before it runs. Predicted by arithmetic in seconds; with a topology also compiled."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.console import Console

from lmeff.config import Experiment
from lmeff.config.loads import absent
from lmeff.config.overrides import resolve
from lmeff.core.errors import ConfigError, DoesNotFit, UsageError
from lmeff.core.files import write_asked
from lmeff.launch import simulate_devices
from lmeff.parallel.devices import Topology, parse_topology
from lmeff.parallel.mesh import MeshPlan, plan_layout
from lmeff.plan.answer import budget_json, estimate_json, join, search_json, serving_json
from lmeff.plan.budget import fit
from lmeff.plan.estimate import Estimate
from lmeff.plan.hardware import Chip, chip
from lmeff.plan.job import Job, jobs
from lmeff.plan.predict import predict
from lmeff.plan.search import search
from lmeff.plan.show import overview, show
from lmeff.plan.verify import ACTIVATIONS, REMEDIES, verify
from lmeff.report import plan_words, words
from lmeff.report.plan import render_plan

Json = dict[str, Any]
SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
MOST_CUTS = 64  # of tensor and of context, where a search begins
COUNTS = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Says before a run what it needs: memory of a device, FLOPs, bytes of collectives, time, energy; and which mesh is best. Needs no accelerator.

    Settings of the config are overridden by their path, as for `lmeff run`. Exit code 6: it does not fit.

    Attributes:
        config: a Python file whose experiment() returns the config.
        stage: the stage to show in full; the first that trains where none is named.
        chip: what to run on, such as v5e, v5p or h100; cpu is this machine.
        devices: how many; as many as the config's mesh asks for where none are named.
        topology: a TPU slice in place of chip and devices, such as v5p:4x4x4 or v5e:16x16:2; the real train step is compiled for it.
        compile: also compile without a topology, for simulated CPU devices.
        no_compile: do not compile for the topology.
        search: try every mesh of so many devices, and tell which are best and why.
        fit: find the largest batch and the largest context that fit.
        budget_bytes: search compressions of the model within this size, such as 4GiB.
        budget_ms: search compressions of the model within so many milliseconds a token.
        tokens: of the whole run in place of its steps, such as 15T.
        layers: cut every model of every stage to its first layers, so that compiling takes seconds; for trying out, no number is then the run's.
        serve: also what the finished model costs to serve.
        html: also write the plan as a page.
        json: print one JSON object on stdout and tables on stderr.
    """

    config: tyro.conf.Positional[Path]
    stage: str | None = None
    chip: str | None = None
    devices: int | None = None
    topology: str | None = None
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    no_compile: tyro.conf.FlagCreatePairsOff[bool] = False
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    fit: tyro.conf.FlagCreatePairsOff[bool] = False
    budget_bytes: str | None = None
    budget_ms: float | None = None
    tokens: str | None = None
    layers: int | None = None
    serve: tyro.conf.FlagCreatePairsOff[bool] = False
    html: Path | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


class Target(NamedTuple):
    """What is planned for. topology: a TPU slice by name, or None."""

    chip: Chip
    devices: int
    topology: Topology | None = None
    name: str | None = None


def check(command: Plan) -> None:
    """Refuses options that say nothing or contradict each other."""
    if command.compile and command.no_compile:
        raise UsageError("plan: got --compile and --no-compile, expected one of the two")
    if command.budget_bytes is not None:
        size("--budget-bytes", command.budget_bytes)
    if command.budget_ms is not None and not 0 < command.budget_ms < math.inf:
        raise UsageError(f"--budget-ms: got {command.budget_ms}, expected milliseconds above 0, such as 20")
    if command.tokens is not None:
        count("--tokens", command.tokens)
    if command.layers is not None and command.layers < 1:
        raise UsageError(f"--layers: got {command.layers}, expected at least 1")


def target(command: Plan, experiment: Experiment) -> Target:
    """The devices that the options name; raises `UsageError` where they contradict each other."""
    if command.topology is not None:
        if command.chip is not None or command.devices is not None:
            raise UsageError(
                f"plan: got --topology {command.topology} with --chip or --devices, expected it alone: a topology has its chips and their number"
            )
        found, family = parse_topology(command.topology), chip(parse_topology(command.topology).family)
        check_slice(found, family, command.topology)
        return Target(family, found.devices, found, command.topology)
    if command.devices is not None and command.devices < 1:
        raise UsageError(f"--devices: got {command.devices}, expected at least 1")
    if command.compile:
        if command.chip not in (None, "cpu"):
            raise UsageError(
                f"plan: got --compile for --chip {command.chip}, expected --chip cpu, or a topology, such as --topology v5p:4x4x4"
            )
        simulate_devices(command.devices or experiment.mesh.devices)
    return Target(chip("cpu" if command.chip is None else command.chip), command.devices or experiment.mesh.devices)


def check_slice(found: Topology, family: Chip, name: str) -> None:
    """Refuses slices that are larger than any of their family."""
    sides = [int(side) for side in found.shape.split("x")]
    if max(sides) > family.longest or math.prod(sides) > family.pod:
        raise ConfigError(
            f"topology: got '{name}', expected slices of at most {family.pod:,} {family.name} chips with sides up to {family.longest}; "
            "several slices are FAMILY:SHAPE:SLICES"
        )


def plan(command: Plan, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff plan`."""
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is left to whoever trains on it
    check(command)
    experiment, _ = resolve(command.config, overrides, prog="lmeff plan")
    where = target(command, experiment)
    begun = on_some_mesh(command, experiment, where, console)
    chosen, others = choose(command, begun, where)
    assumed = told_assumed(experiment, console)
    plans = {job.name: predict(job, where.chip, where.topology) for job in others}
    answers = [estimate_json(estimate) for estimate in plans.values()]
    found = next(answer for answer in answers if answer["stage"] == chosen.name)
    found |= extras(command, plans[chosen.name], where, console, own=begun is experiment)
    answer = join(experiment.name, answers, found) | ({"assumed": assumed} if assumed else {})
    if len(answers) > 1:
        overview(answers, console)
    show(found, console)
    if command.html is not None:
        write_asked("html", command.html, render_plan(answer))
        console.print(f"page: {command.html}", highlight=False, soft_wrap=True)
    if not fits(found):
        reason = plan_words.refusal(found, REMEDIES, ACTIVATIONS)
        unnamed = command.chip is None and command.topology is None
        hint = " This is about this machine's CPU; name another chip with --chip or --topology." if unnamed else ""
        raise DoesNotFit(f"stage '{chosen.name}': {reason}{hint}", answer)
    return answer


def told_assumed(experiment: Experiment, console: Console) -> dict[str, str]:
    """`{stage: folder}` of models that are not here, which are planned from the shapes that their stages say."""
    missing = {name: str(stage.load) for name, stage in absent(experiment, Path(experiment.run_dir)).items()}
    for name, folder in missing.items():
        told = f"stage '{name}': {folder} is not here; planned from the shape that its model says"
        console.print(told, style="yellow", highlight=False, soft_wrap=not console.is_terminal)
    return missing


def on_some_mesh(command: Plan, experiment: Experiment, where: Target, console: Console) -> Experiment:
    """The experiment; for a search with a mesh that can train on so many devices where its own cannot, since every mesh is tried anyway."""
    refusal = refused(experiment, where)
    if not command.search or refusal is None:
        return experiment
    for mesh in simple_meshes(where):
        changed = dataclasses.replace(experiment, mesh=mesh)
        if refused(changed, where) is None:
            shown = plan_layout(mesh, where.devices).describe()
            told = f"the config's mesh cannot train on {words.plural(where.devices, 'device')}; the search begins from {shown} ({refusal})"
            console.print(told, style="yellow", highlight=False, soft_wrap=not console.is_terminal)
            return changed
    return experiment


def refused(experiment: Experiment, where: Target) -> str | None:
    """Why the config as it is cannot train there; None where it can."""
    try:
        jobs(experiment, where.devices, where.chip.platform)
    except ConfigError as error:
        return str(error)
    return None


def simple_meshes(where: Target) -> Iterator[MeshPlan]:
    """Of every device, those of fsdp with tensor and context beside it, the least of these first."""
    slices = 1 if where.topology is None else where.topology.slices
    each = where.devices // slices
    cuts = [n for n in range(1, min(each, MOST_CUTS) + 1) if each % n == 0]
    pairs = [(tensor, context) for tensor in cuts for context in cuts if each % (tensor * context) == 0]
    for tensor, context in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        yield MeshPlan(dcn=slices, fsdp=each // (tensor * context), tensor=tensor, context=context)


def extras(command: Plan, estimate: Estimate, where: Target, console: Console, *, own: bool = True) -> Json:
    """What the options ask for besides the plan itself. own: whether its mesh is the config's."""
    found: Json = {}
    job = estimate.job
    if command.search:
        found["search"] = search_json(search(job, where.chip, topology=where.topology, own=own))
    if command.fit:
        found["room"] = fit(job, where.chip)._asdict()
    if command.budget_bytes is not None or command.budget_ms is not None:
        most = None if command.budget_bytes is None else size("--budget-bytes", command.budget_bytes)
        found["budget"] = budget_json(job, where.chip, bytes=most, ms=command.budget_ms)
    if command.serve:
        found["serving"] = serving_json(job.cfg, where.chip, job.tokens)
    if command.compile or (where.name is not None and not command.no_compile):
        told = where.name or words.plural(where.devices, "simulated CPU device")
        console.print(f"compiling the train step for {told} ...", style="dim", highlight=False)
        found["compiled"] = compiled(estimate, where)
        found["fits"] = found["compiled"]["fits"]
    return found


def compiled(estimate: Estimate, where: Target) -> Json:
    """What the compiler says of the real train step; its word counts."""
    try:
        found = verify(estimate.job, where.name or jax.devices(), predicted=estimate.peak)
    except DoesNotFit as error:
        return {"where": where.name, "fits": False, "refusal": str(error)}
    # A TPU's compiler refuses what does not fit, but knows nothing of what lies beside the step; a CPU's compiles anything.
    taken = (found.peak or 0) if where.name is not None else found.total
    return found.to_json()["compiled"] | {"fits": taken + sum(estimate.peak.held.values()) <= estimate.capacity}


def fits(found: Json) -> bool:
    """A search answers whether any plan does, a budget whether any compression does."""
    if "budget" in found:
        return bool(found["budget"]["options"])
    return found["search"]["fit"] > 0 if "search" in found else found["fits"]


def choose(command: Plan, experiment: Experiment, where: Target) -> tuple[Job, list[Job]]:
    """The job to show in full, and all that are planned."""
    found = jobs(experiment, where.devices, where.chip.platform)
    if command.tokens is not None:
        tokens = count("--tokens", command.tokens)
        found = [job.changed(steps=-(-tokens // (job.rows * job.tokens))) for job in found]
    if command.layers is not None:
        found = [job.shallow(command.layers) for job in found]
    if not found:
        raise ConfigError(
            f"{command.config}: no stage trains, expected one with steps above 0; there is nothing to plan"
        )
    if command.stage is None:
        return found[0], found
    named = [job for job in found if job.name == experiment.stage(command.stage).name]
    if not named:
        raise ConfigError(
            f"stage: '{command.stage}' does not train, expected one of {[job.name for job in found]}; there is nothing to plan"
        )
    return named[0], named


def count(option: str, text: str) -> int:
    """A number with a prefix, such as 15T; raises `UsageError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kMBGT]?)", text)
    value = float(match[1]) * COUNTS[match[2]] if match else 0
    if not 1 <= value < math.inf:
        raise UsageError(f"{option}: got '{text}', expected a number of at least 1, such as 300B, 15T or 2e12")
    return int(value)


def size(option: str, text: str) -> int:
    """Bytes with a unit, such as 4GiB; raises `UsageError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s?(\w+)", text)
    value = float(match[1]) * SIZES.get(match[2], 0) if match else 0
    if not 1 <= value < math.inf:
        raise UsageError(f"{option}: got '{text}', expected a number with a unit of {', '.join(SIZES)}, such as 4GiB")
    return int(value)
