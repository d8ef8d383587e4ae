"""The chunked loss equals the naive one over all logits, in values and gradients, whole and cut over the vocabulary, at a part of its memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.distill.chunked import forward_kl_rows, vocab_log_softmax
from lmeff.distill.objectives import Distill, Projection, head_objective, token_nll
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import Output
from lmeff.parallel.mesh import MeshPlan, make_layout

FAST = {"xla_backend_optimization_level": 0}
STUDENT = ModelConfig(vocab=48, width=16, heads=2, kv_heads=2)
WIDER = ModelConfig(vocab=48, width=24, heads=2, kv_heads=2, tied=False)  # a teacher of another width
ROWS, T = 4, 7  # 28 tokens: ragged against every chunk below
CASES = {
    "tied": ({}, None),
    "untied, softcap": ({"tied": False, "logit_softcap": 2.0}, None),
    "cold teacher": ({"tied": False}, Distill(teacher="t", mix=0.6, temperature=0.5)),
    "teacher only": ({}, Distill(teacher="t", mix=1.0, temperature=1.0)),
    "warm teacher, softcap": ({"logit_softcap": 3.0}, Distill(teacher="t", mix=0.3, temperature=4.0)),
    "labels only": ({"tied": False}, Distill(teacher="t", mix=0.0, temperature=2.0)),
}
LAYOUTS = {
    "one": make_layout(MeshPlan(), jax.devices()[:1]),
    "vocabulary": make_layout(MeshPlan(tensor=4), jax.devices()[:4]),
    "rows and vocabulary": make_layout(MeshPlan(data=2, fsdp=2, tensor=2)),
    "rows, gathered": make_layout(MeshPlan(fsdp=4), jax.devices()[:4]),
    "one half whole": make_layout(MeshPlan(data=2, fsdp=2, tensor=2, zero=1)),
}


def make_output(cfg, seed):
    keys = jax.random.split(jax.random.key(seed))
    shape = (cfg.vocab, cfg.width) if cfg.tied else (cfg.width, cfg.vocab)
    return Output(jax.random.normal(keys[0], (ROWS, T, cfg.width)), jax.random.normal(keys[1], shape), {}, {})


def make_batch():
    targets = np.random.default_rng(0).integers(0, STUDENT.vocab, (ROWS, T), dtype=np.int32)
    weights = np.ones((ROWS, T), np.float32)
    weights[0, -1] = weights[2, 3:] = 0
    weights[1] = 0.5
    ids = np.ones_like(targets)
    return Batch(targets, targets, ids, ids, weights)


def naive(cfg, distill, s, t, batch):
    """All logits at once."""

    def logits(out, cfg):
        x = out.hidden_BTD @ (out.head.T if cfg.tied else out.head)
        return x if cfg.logit_softcap is None else cfg.logit_softcap * jnp.tanh(x / cfg.logit_softcap)

    own = logits(s, cfg)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(own), batch.targets[..., None], -1)[..., 0]
    loss = (nll * batch.weights).sum()
    if distill is None:
        return loss, {"loss": loss}
    p, q = jax.nn.log_softmax(logits(t, WIDER) / distill.temperature), jax.nn.log_softmax(own / distill.temperature)
    kl = ((jnp.exp(p) * (p - q)).sum(-1) * batch.weights).sum()
    return (1 - distill.mix) * loss + distill.mix * distill.temperature**2 * kl, {"loss": loss, "kl": kl}


def chunked(cfg, distill, layout, chunk, s, t, batch):
    teacher = None if distill is None else Projection(WIDER)
    return head_objective(Projection(cfg), teacher, distill, chunk=chunk)(layout, s, t, batch)


def gradients(fn, s, *rest):
    def loss(hidden, head):
        return fn(s._replace(hidden_BTD=hidden, head=head), *rest)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(s.hidden_BTD, s.head)


def assert_close(got, want, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=tolerance * float(np.abs(w).max()), rtol=0)


@functools.cache
def wanted(case):
    changes, distill = CASES[case]
    cfg = dataclasses.replace(STUDENT, **changes)
    s, t, batch = make_output(cfg, 1), make_output(WIDER, 2), make_batch()
    return jax.jit(functools.partial(gradients, functools.partial(naive, cfg, distill)))(s, t, batch)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loss_for_every_chunk(case):
    changes, distill = CASES[case]
    cfg = dataclasses.replace(STUDENT, **changes)
    s, t, batch = make_output(cfg, 1), make_output(WIDER, 2), make_batch()

    def every(s, t, batch):
        one = LAYOUTS["one"]
        fns = [functools.partial(chunked, cfg, distill, one, chunk) for chunk in (5, 8, 28, 1000)]
        return [gradients(fn, s, None if distill is None else t, batch) for fn in fns]

    for got in jax.jit(every)(s, t, batch):
        assert_close(got, wanted(case))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("case", ["untied, softcap", "warm teacher, softcap", "cold teacher"])
def test_cut_over_the_mesh_equals_the_naive_loss(case, layout):
    changes, distill = CASES[case]
    cfg = dataclasses.replace(STUDENT, **changes)
    s, t, batch = make_output(cfg, 1), make_output(WIDER, 2), make_batch()
    fn = functools.partial(chunked, cfg, distill, LAYOUTS[layout], 5)
    got = jax.jit(functools.partial(gradients, fn))(s, None if distill is None else t, batch)
    assert_close(got, wanted(case))


@pytest.mark.parametrize("layout", ["one", "rows and vocabulary"])
def test_token_losses_sum_to_the_loss(layout):
    changes, _ = CASES["untied, softcap"]
    cfg = dataclasses.replace(STUDENT, **changes)
    batch = make_batch()
    nll = token_nll(Projection(cfg), chunk=5)
    found = np.asarray(jax.jit(functools.partial(nll, LAYOUTS[layout]))(make_output(cfg, 1), batch))
    assert ((found == 0) == (batch.weights == 0)).all()
    (loss, _), _ = wanted("untied, softcap")
    np.testing.assert_allclose((found * batch.weights).sum(), loss, rtol=1e-5)


def test_padding_costs_nothing():
    cfg, distill = STUDENT, CASES["warm teacher, softcap"][1]
    s, t, batch = make_output(cfg, 1), make_output(WIDER, 2), make_batch()
    off = batch._replace(weights=batch.weights * (np.arange(ROWS) < 2)[:, None])
    fn = functools.partial(chunked, cfg, distill, LAYOUTS["one"], 7)
    (loss, sums), (d_hidden, d_head) = jax.jit(functools.partial(gradients, fn))(s, t, off)

    def half(x):
        return jax.tree.map(lambda leaf: leaf[:2], x)

    own = s._replace(hidden_BTD=s.hidden_BTD[:2])
    short = (own, t._replace(hidden_BTD=t.hidden_BTD[:2]), half(batch))
    (short_loss, short_sums), (short_hidden, short_head) = jax.jit(functools.partial(gradients, fn))(*short)
    assert (np.asarray(d_hidden[2:]) == 0).all()
    assert loss == short_loss
    assert sums == short_sums
    assert (np.asarray(d_hidden[:2]) == np.asarray(short_hidden)).all()
    assert (np.asarray(d_head) == np.asarray(short_head)).all()


def test_a_teacher_that_is_the_student_teaches_nothing():
    s, batch = make_output(WIDER, 2), make_batch()
    fn = functools.partial(chunked, WIDER, Distill(teacher="t", mix=1.0, temperature=2.0), LAYOUTS["one"], 8)
    (loss, sums), grads = jax.jit(functools.partial(gradients, fn))(s, s, batch)
    assert loss == sums["kl"] == 0
    assert sums["loss"] > 1
    assert all(float(jnp.abs(g).max()) < 1e-5 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_divergence_of_distributions(temperature):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 6, 1000)) * 4
    teacher[0] += 80  # a shift of all logits changes nothing
    student[1, 3] = teacher[1, 3] = 90.0  # all mass on one token

    def log_softmax(x):
        x = x / temperature - (x / temperature).max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    want = (np.exp(p) * (p - q)).sum(-1)
    got = forward_kl_rows(jnp.float32(student), jnp.float32(teacher), temperature, ())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        vocab_log_softmax(jnp.float32(teacher), ()), log_softmax(teacher * temperature), atol=5e-5
    )


def test_memory_is_a_chunk_and_not_all_logits():
    """8,192 tokens, a vocabulary of 32,768: temporary bytes of value and gradient, from the compiler."""
    cfg = ModelConfig(vocab=32_768, width=256, heads=4, kv_heads=4)
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 1024, 256), (32_768, 256)))
    batch = Batch(*[jax.ShapeDtypeStruct((8, 1024), jnp.int32)] * 4, jax.ShapeDtypeStruct((8, 1024), jnp.float32))

    def temporary(fn):
        compiled = jax.jit(functools.partial(gradients, fn)).lower(Output(hidden, head, {}, {}), None, batch)
        return compiled.compile(FAST).memory_analysis().temp_size_in_bytes

    whole = temporary(functools.partial(naive, cfg, None))
    parts = temporary(functools.partial(chunked, cfg, None, LAYOUTS["one"], 1024))
    print(f"\nnaive {whole / 2**20:.0f} MiB, chunked {parts / 2**20:.0f} MiB, {parts / whole:.3f}")
    assert whole > 8192 * 32_768 * 4
    assert parts <= 0.25 * whole


@pytest.mark.parametrize(("field", "value"), [("mix", -0.1), ("mix", 1.1), ("temperature", 0.0)])
def test_bad_distillation_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"distill.{field}: got {value}"):
        Distill(teacher="t", **{field: value})
