"""What a row of the report says that needs no measuring."""

import types

import numpy as np
import pytest

from lmeff.compress.storage import Sparse
from lmeff.config import Experiment, ModelConfig, Prune, Quantize, Stage
from lmeff.recipe.artifact import Recipe
from lmeff.recipe.summary import bits_per_byte, sparse_leaves
from lmeff.train.evaluate import DocumentLosses

CFG = ModelConfig(vocab=264, width=32, layers=2, heads=4, kv_heads=2, ffn=64)


def test_masks_are_inherited_as_zeros_and_own_patterns_are_kept():
    up = (("blocks/mlp/up", True), (".*", False))
    pruned = Stage(name="pruned", start="teacher", compress=(Prune(pattern="2:4", rules=up),))
    later = Stage(name="later", start="pruned", compress=(Quantize(),))
    experiment = Experiment(name="x", model=CFG, recipe=(Stage(name="teacher"), pruned, later))
    shop = types.SimpleNamespace(experiment=experiment, shapes=dict.fromkeys(("teacher", "pruned", "later"), CFG))

    def of(stage):
        return sparse_leaves(shop, stage, types.SimpleNamespace(recipe=Recipe(transforms=stage.compress), cfg=CFG))

    assert of(pruned) == {"blocks/mlp/up": Sparse(2, 4, -2)}
    assert of(later) == {"blocks/mlp/up": Sparse()}
    assert of(experiment.recipe[0]) == {}


def test_bits_per_byte_counts_the_bytes_that_were_read():
    data = types.SimpleNamespace(document_bytes=np.array([100, 50, 70]), document_tokens=np.array([101, 51, 71]))
    nats = np.array([80.0, 40.0, 0.0])
    whole = DocumentLosses(nats, np.array([101.0, 51.0, 0.0]))
    assert bits_per_byte(whole, data) == pytest.approx(120 / np.log(2) / 150)
    half = DocumentLosses(nats, np.array([50.5, 51.0, 0.0]))
    assert bits_per_byte(half, data) == pytest.approx(120 / np.log(2) / 100)
