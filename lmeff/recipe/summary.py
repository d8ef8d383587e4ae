"""From artifacts to the report: every row, comparison and verdict, computed from the same held-out documents."""

import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lmeff.compress.config import Prune, Quantize, describe, pruned
from lmeff.compress.storage import CONVENTION as STORAGE
from lmeff.compress.storage import Sparse, quantized_bytes, storage_bits
from lmeff.config import Claim, Experiment, Stage
from lmeff.config.schema import flat_values
from lmeff.core.numerics import materialize
from lmeff.core.specs import count
from lmeff.core.tree import Tree, flatten
from lmeff.models.cost import CONVENTION as FLOPS
from lmeff.models.cost import flops_per_token
from lmeff.models.transformer import param_specs
from lmeff.parallel.schedule_csv import to_csv
from lmeff.parallel.schedules import resolve
from lmeff.recipe.artifact import Artifact
from lmeff.recipe.measure import TIMING, held_out, make_scorer, timings
from lmeff.recipe.stage import Workshop
from lmeff.report.compare import at_most, compare
from lmeff.report.schema import ArtifactRow, Comparison, Report, RuleRow, Verdict
from lmeff.report.statistics import INTERVAL, bootstrap_mean
from lmeff.train.evaluate import DocumentLosses

Artifacts = Mapping[str, Artifact]
Losses = dict[str, DocumentLosses]


def make_report(
    shop: Workshop, stages: tuple[Stage, ...], artifacts: Artifacts, sources: Mapping[str, str], console: Console
) -> Report:
    """Measures every artifact and puts the report together."""
    experiment, data = shop.experiment, shop.corpus.test
    options = experiment.evaluate
    scorers = {name: make_scorer(artifact, shop.layout, shop.policy) for name, artifact in artifacts.items()}
    losses: Losses = {}
    for name, scorer in scorers.items():
        losses[name] = held_out(scorer, data, shop.layout, options.batch, options.batches)
        console.print(f"measured {name}: {losses[name].mean:.4f} nats/token", highlight=False)
    times = timings(scorers, data, shop.layout, options.batch, options.repeats)
    rows = tuple(_row(shop, stage, artifacts[stage.name], losses[stage.name], times[stage.name]) for stage in stages)
    first = losses[stages[0].name]
    claims = [claim for claim in experiment.claims if {claim.artifact, claim.of} <= artifacts.keys()]
    comparisons = [compare(c.artifact, losses[c.artifact], c.of, losses[c.of], samples=options.samples) for c in claims]
    return Report(
        name=experiment.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        artifacts=rows,
        comparisons=tuple(comparisons),
        verdicts=tuple(
            verdict
            for claim, comparison in zip(claims, comparisons, strict=True)
            for verdict in _verdicts(claim, comparison, artifacts, losses)
        ),
        conventions={"FLOPs": FLOPS, "storage": STORAGE, "timing": TIMING, "interval": INTERVAL},
        environment=_environment(shop),
        config=_nested_config(experiment, sources),
        data=shop.corpus.describe(),
        **_schedule(shop),
        held_out_tokens=int(first.tokens.sum()),
        held_out_documents=int((first.tokens > 0).sum()),
    )


def _schedule(shop: Workshop) -> dict[str, str]:
    """The pipeline's schedule, where layers are pipelined."""
    plan, stages = shop.layout.plan, shop.layout.mesh.shape["pipe"]
    if stages == 1:
        return {}
    made = resolve(plan.schedule, stages, shop.experiment.train.accumulate, plan.chunks)
    return {"schedule": made.name, "schedule_table": to_csv(made)}


def _row(
    shop: Workshop, stage: Stage, artifact: Artifact, losses: DocumentLosses, times: tuple[float, float, float]
) -> ArtifactRow:
    specs = param_specs(artifact.cfg)
    seen = artifact.effective()
    bits = storage_bits(seen, sparse_leaves(shop, stage, artifact))
    mean, low, high = bootstrap_mean(losses.nats, losses.tokens, samples=shop.experiment.evaluate.samples)
    median, fast, slow = times
    return ArtifactRow(
        name=artifact.name,
        kind=kind(stage, artifact, shop.experiment.steps(stage)),
        loss=mean,
        loss_interval=(low, high),
        bits_per_byte=bits_per_byte(losses, shop.corpus.test),
        parameters=count(specs),
        nonzero_parameters=_nonzero(seen),
        stored_bytes=-(-bits // 8),
        effective_bits=bits / count(specs),
        flops_per_token=flops_per_token(artifact.cfg, shop.experiment.data.sequence),
        ms_per_token=median,
        ms_interval=(fast, slow),
        parents=stage.parents,
        train_tokens=artifact.details["tokens"],
        train_seconds=artifact.details["seconds"],
        curve=tuple((step, tokens, loss) for step, tokens, loss in artifact.details["curve"]),
        rules=rule_rows(artifact.recipe.transforms, specs),
        note=artifact.details.get("note", ""),
    )


def sparse_leaves(shop: Workshop, stage: Stage, artifact: Artifact) -> dict[str, Sparse]:
    """The leaves that have masks, of this stage or of one that it came from; an inherited N:M pattern counts as a plain mask."""
    found: dict[str, Sparse] = {}
    start = stage.start
    while start is not None:
        origin = shop.experiment.stage(start)
        found |= dict.fromkeys(pruned(origin.compress, param_specs(shop.shapes[start])), Sparse())
        start = origin.start
    return found | pruned(artifact.recipe.transforms, param_specs(artifact.cfg))


def rule_rows(transforms: tuple[Any, ...], specs: Tree) -> tuple[RuleRow, ...]:
    """What the transforms' rules resolve to, leaf by leaf."""
    shapes = {path: spec.shape for path, spec in flatten(specs).items()}
    rows = describe(transforms, specs)
    return tuple(RuleRow(path=path, letters=letters, shape=shapes[path], rule=rule) for path, letters, _, rule in rows)


def kind(stage: Stage, artifact: Artifact, steps: int) -> str:
    """What was done to a model, in words: "dense", "pruned + distilled", "shrunk + distilled", "packed int4/g32"."""
    words = ["shrunk"] if stage.shrink is not None else []
    for transform in artifact.recipe.transforms:
        if isinstance(transform, Prune):
            words.append("pruned")
        if isinstance(transform, Quantize):
            formats = "/".join(dict.fromkeys(text for _, text in transform.rules if text is not None))
            made = "packed" if artifact.recipe.packed else "QAT" if steps else "rounded"
            words.append(f"{made} {formats}")
    if artifact.recipe.numerics.activations:
        words.append("quantized activations")
    if stage.distill is not None:
        words.append("distilled")
    return " + ".join(words) or "dense"


def bits_per_byte(losses: DocumentLosses, data: Any) -> float:
    """Bits per UTF-8 byte; of a document read in part, as many bytes count as its share of tokens."""
    share = losses.tokens / np.maximum(data.document_tokens, 1)
    return float(losses.nats.sum() / np.log(2) / (data.document_bytes * share).sum())


def _nonzero(params: Any) -> int:
    values = jax.jit(lambda p: [(x != 0).sum() for x in jax.tree.leaves(materialize(p))])(params)
    return int(sum(int(value) for value in values))


def _verdicts(claim: Claim, comparison: Comparison, artifacts: Artifacts, losses: Losses) -> list[Verdict]:
    """Whether a claim holds, with the arithmetic."""
    loss, base = losses[claim.artifact].mean, losses[claim.of].mean
    rise = comparison.difference / base
    bound = f"within {claim.within:.1%} of" if claim.within else "no worse than"
    low, high = comparison.interval
    detail = f"loss {loss:.4f} against {base:.4f}, {rise:+.2%}; difference {comparison.difference:+.4f} [{low:+.4f}, {high:+.4f}] nats/token"
    found = [at_most(f"{claim.artifact} is {bound} {claim.of} in loss", rise, claim.within, detail)]
    if claim.bytes_at_most is not None:
        packed, dense = quantized_bytes(artifacts[claim.artifact].effective())
        text = f"the quantized leaves of {claim.artifact} take at most {claim.bytes_at_most:g} of their float32 bytes"
        share = packed / dense if dense else float("nan")
        found.append(at_most(text, share, claim.bytes_at_most, f"{packed:,} of {dense:,} bytes"))
    return found


def _environment(shop: Workshop) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "mesh": shop.layout.describe(", "),
    }


def _nested_config(experiment: Experiment, sources: Mapping[str, str]) -> dict[str, Any]:
    """The resolved config by sections, each value with its origin."""
    nested: dict[str, Any] = {}
    for path, value in flat_values(experiment):
        *sections, name = path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = {"value": value, "origin": sources.get(path, "the run")}
    return nested
