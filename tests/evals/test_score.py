"""Scores equal the model in NumPy float64, whatever the rows are batched with, packed into or cut over."""

import dataclasses

import jax
import numpy as np
import pytest

from lmeff.core.errors import DataError
from lmeff.core.numerics import QFormat
from lmeff.core.ops import Numerics
from lmeff.evals.score import Row, make_batch, make_scorer, rung
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import MeshPlan
from tests.evals.scored import CFG, log_probabilities, make_served, plain_scorer, sample

UNTIED = ModelConfig(vocab=264, width=32, layers=2, heads=4, kv_heads=2, ffn=64, tied=False, logit_softcap=8.0)
MODELS = {
    "tied": {},
    "int8": {"weights": "int8"},
    "untied, softcap, int4/g16": {"cfg": UNTIED, "weights": "int4/g16"},
}
MESHES = {
    "data x tensor": (MeshPlan(data=2, tensor=2), 4),
    "fsdp x context": (MeshPlan(fsdp=2, context=2), 4),
    "pipe x tensor": (MeshPlan(pipe=2, tensor=2), 4),
}


def check(scorer, rows, rtol):
    for row, found in zip(rows, scorer(rows), strict=True):
        wanted = log_probabilities(scorer.served, row.ids)
        targets = row.ids[1:]
        np.testing.assert_allclose(
            found.nats, -wanted[np.arange(len(targets)), targets][-row.scored :], rtol=rtol, atol=1e-5
        )
        np.testing.assert_array_equal(found.greedy, (wanted.argmax(-1) == targets)[-row.scored :])


def rows_of(scorer, seed=0):
    """Rows of several lengths; half of them begin with what the model itself would say, so that some targets are greedy."""
    rng = np.random.default_rng(seed)
    rows = [Row(ids, scored) for ids, scored in zip(sample(rng, 2, 9, 20), (1, 3, 19), strict=True)]
    greedy = []
    for ids, scored in rows:
        ids = ids.copy()
        ids[-1] = log_probabilities(scorer.served, ids).argmax(-1)[-1]
        greedy.append(Row(ids, scored))
    return rows + greedy


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_the_model_in_float64(model):
    scorer = make_scorer(make_served(**MODELS[model]), rows=4, longest=64)
    rows = rows_of(scorer)
    check(scorer, rows, rtol=1e-3)
    assert any(found.greedy[-1] for found in scorer(rows))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_scores_as_one_device(mesh):
    plan, devices = MESHES[mesh]
    scorer = make_scorer(make_served(plan=plan, devices=devices), rows=3, longest=64)
    rows = rows_of(plain_scorer())
    for found, wanted in zip(scorer(rows), plain_scorer()(rows), strict=True):
        np.testing.assert_allclose(found.nats, wanted.nats, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.greedy, wanted.greedy)


def test_formats_of_activations_reach_the_scores():
    sites = ("attn.k", "attn.o", "attn.q", "attn.v", "head", "mlp.down", "mlp.gate", "mlp.up")
    coarse = Numerics(tuple((site, QFormat(bits=4)) for site in sites))
    rows = rows_of(plain_scorer())[:2]
    floating = np.concatenate([s.nats for s in plain_scorer()(rows)])
    found = np.concatenate([s.nats for s in make_scorer(make_served(numerics=coarse), rows=2)(rows)])
    assert 1e-3 < np.abs(found - floating).mean() < 0.5 * np.abs(floating).mean()


def test_few_lengths_and_each_fits():
    layout = make_served().layout
    ladder = {n: rung(n, layout) for n in range(1, 2049)}
    assert all(n <= size < max(17, 1.5 * n + 1) for n, size in ladder.items())
    assert len(set(ladder.values())) == 15


def test_one_program_a_length():
    shapes = set()
    scorer = plain_scorer()

    def step(held, ranges, batch):
        shapes.add(batch.tokens.shape)
        return scorer.step(held, ranges, batch)

    rng = np.random.default_rng(0)
    for count in (1, 4, 6):
        dataclasses.replace(scorer, step=step)([Row(ids, 1) for ids in sample(rng, *[10 + count] * count)])
    assert shapes == {(4, 16)}


def test_padding_has_no_weight():
    batch = make_batch([Row(np.array([3, 4, 5, 6], np.int32), 2)], 2, 8)
    np.testing.assert_array_equal(batch.tokens[0], [3, 4, 5, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.targets[0], [4, 5, 6, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8])


@pytest.mark.parametrize(("count", "scored"), [(1, 1), (4, 0), (4, 4), (66, 1)])
def test_rows_that_cannot_be_scored_are_refused(count, scored):
    with pytest.raises(DataError, match=f"row 0 .*got {count} ids of which {scored}"):
        plain_scorer()([Row(np.zeros(count, np.int32), scored)])


def test_a_row_longer_than_the_model_s_context_is_refused():
    served = make_served(ModelConfig(vocab=264, width=32, layers=2, heads=4, kv_heads=2, ffn=64, context=128))
    assert make_scorer(served).longest == 128
    with pytest.raises(DataError, match="got 129 tokens, expected 1 to 128"):
        make_scorer(served, longest=129)


def test_devices_are_simulated():
    assert len(jax.devices()) == 8
    assert CFG.vocab % 8 == 0
