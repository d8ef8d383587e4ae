"""Metrics, progress and held-out losses."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lmeff.core.ops import make_ops
from lmeff.core.precision import Policy
from lmeff.models.transformer import project
from lmeff.train.evaluate import document_losses, make_eval_step
from lmeff.train.metrics import MetricsWriter, read_metrics
from lmeff.train.optim import OptimConfig
from lmeff.train.progress import BarProgress, LineProgress, make_progress
from tests.train.tiny_run import make_batch, make_runtime, make_state


def test_metrics_are_strict_json_lines(tmp_path):
    file = tmp_path / "deep" / "metrics.jsonl"
    writer = MetricsWriter(file)
    writer.write(1, {"loss": 1.5, "kl": float("nan"), "norm": float("inf"), "tokens": 7})
    writer.write(2, {"loss": 1.25})
    rows = read_metrics(file)  # before closing: a line is there once written
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.5), (2, 1.25)]
    assert rows[0]["kl"] is None
    assert rows[0]["norm"] is None
    assert rows[0]["tokens"] == 7
    assert rows[0]["time"] <= rows[1]["time"]
    writer.close()
    assert "NaN" not in file.read_text()


def test_metrics_resume_without_gaps_or_doubles(tmp_path):
    file = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(file)
    for step in range(1, 8):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with file.open("a") as f:
        f.write('{"step": 8, "lo')  # cut off by a kill
    assert [r["step"] for r in read_metrics(file)] == list(range(1, 8))
    writer = MetricsWriter(file, resume_step=4)
    writer.write(5, {"loss": 50.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(file)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert [json.loads(x) for x in file.read_text().splitlines()] == read_metrics(file)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def told(progress, steps):
    for step in range(1, steps + 1):
        progress.update(step, loss=2.0, tokens_per_second=1234.5)
    progress.close()


def test_lines_where_nobody_watches():
    out = io.StringIO()
    progress = make_progress("dense", 100, Console(file=out, force_terminal=False, width=200))
    assert isinstance(progress, LineProgress)
    told(progress, 100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "dense: step 1/100  loss 2.0000  1,234 tokens/s"
    assert lines[-1].startswith("dense: step 100/100")
    assert len(lines) == 11
    assert "\x1b" not in out.getvalue()


def test_short_runs_end_on_their_last_step():
    out = io.StringIO()
    told(make_progress("dense", 3, Console(file=out, force_terminal=False, width=200)), 3)
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["1/3", "2/3", "3/3"]


def test_bar_on_a_terminal():
    out = io.StringIO()
    progress = make_progress("dense", 20, Console(file=out, force_terminal=True, width=120))
    assert isinstance(progress, BarProgress)
    told(progress, 20)
    assert "20/20" in out.getvalue()
    assert "1,234 tokens/s" in out.getvalue()
    assert "\x1b[" in out.getvalue()


@pytest.fixture(scope="module")
def scored():
    rt = make_runtime(OptimConfig(), 10, compressed=False)
    params = make_state(rt).trainable.params
    step = make_eval_step(rt.student, rt.layout, Policy())
    return rt, params, lambda batch: step(params, (), None, batch)


def test_held_out_losses_by_document_are_those_of_the_plain_logits(scored):
    rt, params, step = scored
    batches = []
    for i in range(2):
        batch = make_batch(100 + i)
        weights = batch.weights.copy()
        weights[:, -3:] = 0  # targets without weight count nowhere
        batches.append((batch._replace(weights=weights), np.arange(8)[:, None].repeat(32, 1) // 2 + i))
    found = document_losses(step, batches, 6, rt.layout)
    nats, tokens = np.zeros(6), np.zeros(6)
    for batch, documents in batches:
        out = rt.student.run(rt.layout, params, (), jax.tree.map(jnp.asarray, batch), None, Policy(), "none")
        logits = project(out.hidden_BTD, out.head, rt.student.cfg, make_ops(attend=None)({}).ops)
        losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], -1)[..., 0]
        for document in range(6):
            chosen = (documents == document) & (batch.weights > 0)
            nats[document] += losses[chosen].sum()
            tokens[document] += chosen.sum()
    np.testing.assert_array_equal(found.tokens, tokens)
    assert found.tokens.tolist() == [58, 116, 116, 116, 58, 0]  # 29 counted targets a row
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert found.mean == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
