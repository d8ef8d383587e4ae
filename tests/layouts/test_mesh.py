"""Plans, partitions and what cannot be cut."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import AXES, MeshPlan, indivisible, make_layout, shardings
from lmeff.parallel.rows import place_batch
from tests.layouts.trial import make_batch


@pytest.mark.parametrize(
    ("plan", "devices", "want"),
    [
        (MeshPlan(), 8, {"data": 8}),
        (MeshPlan(), 1, {}),
        (MeshPlan(fsdp=4), 8, {"data": 2, "fsdp": 4}),
        (MeshPlan(data=2, fsdp=2, tensor=2), 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshPlan(tensor=8), 8, {"tensor": 8}),
        (MeshPlan(dcn=2, pipe=2, context=2, sequence="gather"), 8, {"dcn": 2, "data": 1, "pipe": 2, "context": 2}),
    ],
)
def test_degrees(plan, devices, want):
    degrees = plan.degrees(devices)
    assert tuple(degrees) == AXES
    assert degrees == {axis: want.get(axis, 1) for axis in AXES}


@pytest.mark.parametrize(
    ("plan", "devices", "message"),
    [
        ({"fsdp": 0}, 8, r"mesh\.fsdp: got 0, expected at least 1"),
        ({"data": -1}, 8, r"mesh\.data: got -1"),
        ({"zero": 4}, 8, r"mesh\.zero: got 4, expected a stage of ZeRO"),
        ({"sequence": "rings"}, 8, r"mesh\.sequence: got 'rings', expected one of"),
        ({"pipe": 2, "context": 2}, 8, r"mesh\.sequence: got 'ring' on pipe 2 x context 2, expected 'gather'"),
        ({"fsdp": 3}, 8, r"data \* x fsdp 3 on 8 devices"),
        ({"data": 2, "tensor": 2}, 8, r"data 2 x tensor 2 on 8 devices.*--devices 4"),
        ({"fsdp": 16}, 8, r"on 8 devices.*--devices 16"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, devices, message):
    with pytest.raises(ConfigError, match=message):
        MeshPlan(**plan).degrees(devices)


def test_precedence_of_letters():
    layout = make_layout(MeshPlan(data=2, fsdp=2, tensor=2))
    batch = ("data", "fsdp")
    assert layout.partition("BTD") == P(batch, "tensor", None), (
        "B has fsdp before D; T takes tensor where nothing else wants it"
    )
    assert layout.partition("BTF") == P(batch, None, "tensor")
    assert layout.partition("BTHC") == P(batch, None, "tensor", None)
    assert layout.partition("LDHC") == P(None, "fsdp", "tensor", None)
    assert layout.partition("VD") == P("tensor", "fsdp")
    assert layout.partition("B__") == P(batch, None, None)
    assert layout.within(batch).partition("BTD") == P(None, "tensor", None)
    assert layout.within(batch).axes("B") == ()
    assert layout.axes("B") == batch
    assert layout.size(batch) == 4


def test_what_does_not_divide_stays_whole():
    layout = make_layout(MeshPlan(fsdp=2, tensor=4))
    assert layout.partition("BTD", (8, 6, 32)) == P("fsdp", None, None)
    assert layout.partition("BTD", (3, 8, 32)) == P(None, "tensor", "fsdp")
    assert layout.partition("DKC", (32, 2, 8)) == P("fsdp", None, None)


def test_axes_of_one_device_are_not_named():
    layout = make_layout(MeshPlan(), jax.devices()[:1])
    assert layout.single
    assert layout.partition("BTD") == P(None, None, None)
    assert layout.on_shards(len, ("B",), "") is len
    x = np.ones((2, 3, 4))
    assert layout.place(x, "BTD") is x


def test_what_a_plan_cannot_cut_is_named():
    cfg = ModelConfig(vocab=30, width=24, heads=4, kv_heads=2, ffn=40)
    degrees = MeshPlan(fsdp=2, tensor=4).degrees(8)
    assert set(indivisible(param_specs(cfg), degrees)) == {"V = 30 over tensor = 4", "K = 2 over tensor = 4"}
    assert indivisible(param_specs(cfg), MeshPlan(fsdp=4, tensor=2).degrees(8)) == []


def test_states_that_mirror_parameters_are_cut_as_they_are():
    layout = make_layout(MeshPlan(fsdp=4, tensor=2))
    specs = {"w": ParamSpec(letters="LDF", shape=(2, 8, 6), contract="D")}
    assert shardings({"w": np.zeros((2, 8, 6))}, specs, layout)["w"].spec == P(None, "fsdp", "tensor")
    state = {
        "moment": {"w": np.zeros((2, 8, 6))},
        "scale": {"w": np.zeros((2, 1, 6))},
        "count": np.zeros(()),
        "groups": {"w": np.zeros((2, 4, 6))},
    }
    found = {
        name: jax.tree.leaves(shardings(tree if isinstance(tree, dict) else {"": tree}, specs, layout))[0].spec
        for name, tree in state.items()
    }
    assert found["moment"] == P(None, "fsdp", "tensor")
    assert found["scale"] == found["groups"] == P(None, None, "tensor")
    assert found["count"] == P()


def test_rows_of_a_batch_lie_on_the_batch_axes():
    layout = make_layout(MeshPlan(data=2, fsdp=2, tensor=2))
    placed = place_batch(make_batch(), layout)
    assert {x.sharding.spec for x in placed} == {P(("data", "fsdp"), None)}
    np.testing.assert_array_equal(placed.tokens, make_batch().tokens)
