"""Every family against transformers: what it saves is read, computes the same logits, and what is written it opens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.shrink import Plan, shrink
from lmeff.core.batch import Batch
from lmeff.interop.config_json import choose, config_of, keys_of, unsaid
from lmeff.interop.families import FAMILIES
from lmeff.interop.hf import details, export, load
from lmeff.interop.tensors import open_tensors
from lmeff.models.config import MoE, RopeScaling
from lmeff.models.transformer import forward, project
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import layout_ops
from tests.interop.hf_cases import CASES, SIZES, TOKENS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

CLOSE = 2e-5
IDS = np.random.default_rng(0).integers(0, 61, (2, TOKENS))
LAYOUT = make_layout(MeshPlan(), jax.devices()[:1])


def built(keys):
    """A model of transformers with random weights, biases and norms."""
    kind = keys["model_type"]
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind](**json.loads(json.dumps(keys)))
    torch.manual_seed(0)
    auto = transformers.AutoModelForImageTextToText if kind == "gemma3" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def reopened(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def theirs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), use_cache=False).logits.numpy()


def ours(cfg, params):
    ops = layout_ops(LAYOUT)
    ones = np.ones(IDS.shape, np.int32)
    place = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), IDS.shape)
    batch = Batch(tokens=IDS.astype(np.int32), targets=ones, segments=ones, positions=place, weights=ones)

    def logits(params):
        out = forward(params, batch, cfg, make_ops=ops)
        return project(out.hidden_BTD, out.head, cfg, ops({}).ops)

    return np.asarray(jax.jit(logits)(params))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def assert_same_files(one, other):
    ours, theirs = open_tensors(one), open_tensors(other)
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_logits_and_files_are_those_of_transformers(case, tmp_path):
    keys = CASES[case]
    model = built(keys)
    folder = saved(model, tmp_path / "theirs")
    cfg, params = load(folder, LAYOUT)
    expected = theirs(model)
    away = np.abs(ours(cfg, params) - expected).max()
    print(f"{case}: {away:.1e} of {np.abs(expected).max():.2f}")
    assert np.ptp(expected) > 0.5
    assert away <= CLOSE
    # Both spellings of the config say the same.
    assert cfg == config_of(FAMILIES[keys["model_type"]], keys, "spelled as in transformers 4")
    about = details(folder)
    export(cfg, params, tmp_path / "back", family=about["family"], keep=about["keep"])
    assert_same_files(tmp_path / "back", folder)
    np.testing.assert_array_equal(theirs(reopened(tmp_path / "back")), expected)


@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.part is None])
def test_absent_keys_mean_what_they_mean_to_transformers(kind):
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]()
    full = json.loads(config.to_json_string(use_diff=False))
    assert config_of(FAMILIES[kind], {}, "nothing") == config_of(FAMILIES[kind], full, "everything")


def test_the_text_of_a_gemma3_with_pictures(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {key: value for key, value in CASES["gemma3, pattern"].items() if key not in ("model_type", "vocab_size")}
    keys = {
        "model_type": "gemma3",
        "text_config": {**text, "vocab_size": 61},
        "vision_config": {**vision, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 59,
        "eoi_token_index": 58,
    }
    model = built(keys)
    folder = saved(model, tmp_path / "theirs")
    cfg, params = load(folder, LAYOUT)
    expected = theirs(model)
    assert np.abs(ours(cfg, params) - expected).max() <= CLOSE
    assert export(cfg, params, tmp_path / "back", family="gemma3").name == "gemma3_text"
    np.testing.assert_allclose(theirs(reopened(tmp_path / "back")), expected, atol=1e-6)


def test_a_model_with_heads_cut_opens_with_a_width_of_heads_of_its_own(tmp_path):
    """A cut from four heads to three leaves a width that heads do not divide: llama's config refuses that, mistral's does not, and the maths is one."""
    keys = {
        "model_type": "mistral",
        **SIZES,
        "sliding_window": None,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    model = built({**keys, "head_dim": 8})
    cfg, params = load(saved(model, tmp_path / "theirs"), LAYOUT)
    assert export(cfg, params, tmp_path / "back").name == "mistral"
    np.testing.assert_array_equal(theirs(reopened(tmp_path / "back")), theirs(model))
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        transformers.LlamaConfig(hidden_size=32, num_attention_heads=3, head_dim=8)


def test_half_precision_and_shards_come_back_byte_for_byte(tmp_path):
    model = built(CASES["llama, grouped, untied"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    cfg, params = load(tmp_path / "theirs", LAYOUT, jnp.float32)
    export(cfg, params, tmp_path / "back", dtype=jnp.bfloat16, shard_bytes=10_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert_same_files(tmp_path / "back", tmp_path / "theirs")
    assert str(transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype) == "torch.bfloat16"
    np.testing.assert_array_equal(theirs(reopened(tmp_path / "back")), theirs(reopened(tmp_path / "theirs")))


SEEN = {
    "llama, linear": {"rope_scaling": None},
    "llama, dynamic": {"rope_scaling": None},
    "llama, yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original=16, attention=1.0)},
    "llama, yarn, every key": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original=16)},
    "llama, llama3": {"rope_scaling": None},
    "llama, longrope": {"rope_scaling": None},
    "mistral, window": {"window": 6},
    "qwen2, later layers": {"full_layers": (1,)},
    "gemma2": {"full_layers": (0,)},
    "gemma2, low caps, untied, biases": {"attention_softcap": None},
    "gemma2, no caps, one key head": {"attention_scale": 0.3},
    "gemma3, pattern": {"rope_local_theta": 600.0},
    "gemma3, kinds": {"embed_scale": 5.6},
    "mixtral": {"moe": MoE(experts=4, normalize=False)},
    "olmo2": {"norm_eps": 1e-3},
    "phi3, part of the channels": {"rope_fraction": 1.0},
    "phi3, longrope, long": {"rope_scaling": None},
    "phi3, longrope, short": {"rope_scaling": None},
    "gpt2, unscaled scores, odd heads": {"attention_scale": None},
}


@pytest.mark.parametrize("case", SEEN)
def test_the_comparison_sees_a_field_that_is_wrong(case, tmp_path):
    model = built(CASES[case])
    cfg, params = load(saved(model, tmp_path / "theirs"), LAYOUT)
    assert np.abs(ours(dataclasses.replace(cfg, **SEEN[case]), params) - theirs(model)).max() > 5 * CLOSE


@pytest.mark.parametrize(
    "case", ["llama, grouped, untied", "qwen2, kinds", "gemma2", "phi3, longrope, long", "mixtral"]
)
def test_a_model_with_parts_cut_out_is_a_valid_smaller_one(case, tmp_path):
    """Layers, key heads with their queries, and neurons: transformers opens what is left, and computes the same."""
    model = built(CASES[case])
    cfg, params = load(saved(model, tmp_path / "theirs"), LAYOUT)
    size = cfg.heads // cfg.kv_heads
    group = cfg.kv_heads - 1
    plan = Plan(
        layers=np.array([cfg.layers - 1]),
        neurons=None if cfg.moe is not None else np.arange(0, cfg.ffn, 2)[None],
        groups=np.array([[group]]),
        heads=np.arange(group * size, cfg.heads)[None],
    )
    small, cut, _ = shrink(cfg, params, (), plan)
    assert (small.layers, small.heads, small.kv_heads, small.head_size) == (1, size, 1, cfg.head_size)
    export(small, cut, tmp_path / "back", family=None if "phi3" in case else details(tmp_path / "theirs")["family"])
    assert np.abs(ours(small, cut) - theirs(reopened(tmp_path / "back"))).max() <= CLOSE
    assert load(tmp_path / "back", LAYOUT)[0] == small


def test_a_phi3_whose_heads_were_cut_is_written_as_a_llama(tmp_path):
    """Phi-3's config counts the divisors of its rotation by width / heads, whatever the head's own width is."""
    model = built(CASES["phi3, longrope, long"])
    cfg, _ = load(saved(model, tmp_path / "theirs"), LAYOUT)
    cut = dataclasses.replace(cfg, heads=2, kv_heads=1, head_width=cfg.head_size)
    family = FAMILIES["phi3"]
    with pytest.raises(Exception, match="short_factor field must have length 8, got 4"):
        transformers.Phi3Config(**keys_of(family, cut), pad_token_id=None)
    assert unsaid(family, cut) == ["model.head_width = 8, of which longrope wants model.width / model.heads = 16"]
    assert choose(cut, None, tmp_path).name == "llama"


def test_what_is_written_says_what_was_read():
    for case, keys in CASES.items():
        family = FAMILIES[keys["model_type"]]
        cfg = config_of(family, keys, case)
        written = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family.name](**keys_of(family, cfg))
        again = json.loads(written.to_json_string(use_diff=False))
        assert config_of(family, again, case) == cfg, case
