"""Moments in the host's memory: the same numbers, bit for bit, and nothing of them on the device between steps."""

import dataclasses

import jax
import numpy as np
import pytest

from lmeff.parallel.rows import place_batch
from lmeff.train.runtime import Frozen
from lmeff.train.state import create_state
from tests.layouts.trial import MODELS, Mesh, compile_step, leaves, make_batch, make_params, make_runtime


def two_steps(mesh, offload):
    rt = dataclasses.replace(make_runtime(mesh, "plain"), offload=offload)
    params = make_params(MODELS[mesh.model], 0)
    state = create_state(params, rt.specs, rt.compression, rt.tx, rt.layout, ema=False, offload=offload)
    batch = place_batch(make_batch(), rt.layout)
    step = compile_step(rt, state, batch, Frozen())
    for _ in range(2):
        state, _ = step(state, batch, Frozen())
    return state


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=2, fsdp=2, tensor=2)])
def test_offloaded_moments_change_nothing(mesh):
    here, there = two_steps(mesh, False), two_steps(mesh, True)
    for (path, got), want in zip(leaves(there).items(), leaves(here).values(), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=path)
    arrays = [x for x in jax.tree.leaves(there.opt) if x.ndim]
    assert {x.sharding.memory_kind for x in arrays} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(there.trainable)} == {"device"}
    cut = [x.sharding.spec for x in arrays]
    assert cut == [x.sharding.spec for x in jax.tree.leaves(here.opt) if x.ndim]
