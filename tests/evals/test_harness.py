"""The real harness on local files gives the numbers of our own tasks on the same items."""

import json

import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.evals.perplexity import perplexity
from lmeff.evals.tasks import read_items, run_task
from lmeff.infer.sampling import GREEDY, Sampling
from tests.evals.scored import TOKENIZER, log_probabilities, plain_scorer
from tests.evals.test_tasks import questions, written

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
pytest.importorskip("lm_eval")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
LONG = "the quick brown fox jumps over the lazy dog, " * 3  # more than two rows of the scorer


@pytest.fixture
def harness(monkeypatch, tmp_path):
    for name in OFFLINE:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lmeff.evals import harness

    return harness


def task(name, file, metrics, **fields):
    listed = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": name, **data, "metric_list": listed, "num_fewshot": 0, **fields}


def evaluated(harness, tmp_path, config, **options):
    found = harness.evaluate(plain_scorer(), TOKENIZER, [config], bootstrap_iters=0, **options)
    return found["results"][config["task"]], found["samples"][config["task"]]


def test_multiple_choice_equals_ours(harness, tmp_path):
    file = written(tmp_path, questions(24))
    metrics = ("acc", "acc_norm", "acc_bytes")
    fields = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
    config = task("local_choices", file, metrics, output_type="multiple_choice", **fields)
    found, samples = evaluated(harness, tmp_path, config)
    ours = run_task(plain_scorer(), TOKENIZER, read_items(file))
    for metric in metrics:
        assert found[f"{metric},none"] == pytest.approx(ours.summary()[metric]["value"])
    for sample, nats in zip(sorted(samples, key=lambda s: s["doc_id"]), ours.nats, strict=True):
        told = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(told, -nats, rtol=1e-5)


def test_continuations_equal_ours(harness, tmp_path):
    rows = [{"context": f"number {i} is", "continuation": f" {word}"} for i, word in enumerate(("é", "two", "3 4"))]
    file = written(tmp_path, [*rows, {"context": "w" * 100, "continuation": " long"}])
    config = task(
        "local_endings",
        file,
        ("perplexity", "acc"),
        output_type="loglikelihood",
        doc_to_text="{{context}}",
        doc_to_target="{{continuation}}",
        target_delimiter="",
    )
    config["metric_list"][0] |= {"aggregation": "perplexity", "higher_is_better": False}
    found, _ = evaluated(harness, tmp_path, config)
    ours = run_task(plain_scorer(), TOKENIZER, read_items(file))
    assert ours.truncated == 1
    assert np.log(found["perplexity,none"]) == pytest.approx(ours.summary()["nats"]["value"], rel=1e-5)
    assert found["acc,none"] == ours.summary()["acc"]["value"]


def test_rolling_perplexity_equals_ours(harness, tmp_path):
    texts = ["a man, a plan", LONG]
    file = written(tmp_path, [{"text": text} for text in texts])
    config = task(
        "local_text",
        file,
        ("bits_per_byte",),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )
    config["metric_list"][0] |= {"aggregation": "bits_per_byte", "higher_is_better": False}
    found, _ = evaluated(harness, tmp_path, config)
    ours = perplexity(plain_scorer(), TOKENIZER, texts, stride=64)
    assert found["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-5)


def test_the_model_is_registered(harness):
    from lm_eval.api.registry import get_model

    assert get_model("lmeff") is harness.HarnessModel


def test_answers_are_offered_to_the_cache(harness, tmp_path):
    told = {}
    model = harness.HarnessModel(plain_scorer(), TOKENIZER)
    model.cache_hook.add_partial = lambda kind, asked, answer: told.__setitem__((kind, *asked), answer)
    from lm_eval.api.instance import Instance

    def request(kind, *args):
        return Instance(request_type=kind, doc={}, arguments=args, idx=0)

    (one,) = model.loglikelihood([request("loglikelihood", "a", " b")])
    (two,) = model.loglikelihood_rolling([request("loglikelihood_rolling", "some text")])
    assert told == {("loglikelihood", "a", " b"): one, ("loglikelihood_rolling", "some text"): two}
    assert json.dumps([one, two])


def test_generation_through_the_harness(harness, tmp_path):
    """Exact match with the greedy answer, found by hand in float64: stopped by a string, by the number of tokens."""
    contexts = ["say", "a dog", "no"]
    answers = []
    for context in contexts:
        ids = [TOKENIZER.bos, *context.encode()]
        for _ in range(6):
            ids.append(int(log_probabilities(plain_scorer().served, [*ids, 0])[-1].argmax()))
        answers.append(TOKENIZER.decode(ids[1 + len(context) :]))
    stop = answers[0][2]
    rows = [{"q": q, "a": a.partition(stop)[0]} for q, a in zip(contexts, answers, strict=True)]
    config = task(
        "local_text",
        written(tmp_path, rows),
        ("exact_match",),
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": [stop], "max_gen_toks": 6, "do_sample": False},
    )
    _, samples = evaluated(harness, tmp_path, config)
    told = [sample["resps"][0][0] for sample in sorted(samples, key=lambda s: s["doc_id"])]
    assert told == [row["a"] for row in rows]


def test_options_of_generation(harness):
    read = harness.read_options
    assert read({"until": "x"}) == (("x",), GREEDY, 256)
    assert read({"temperature": 0.0, "max_gen_toks": 3}) == ((), GREEDY, 3)
    assert read({"temperature": 0.5, "top_k": 4}).sampling == Sampling(temperature=0.5, top_k=4)
    assert read({"temperature": 0.5, "do_sample": False}).sampling == GREEDY
    assert read({"do_sample": True, "top_p": 0.9}).sampling == Sampling(top_p=0.9)
    with pytest.raises(ConfigError, match="got num_beams, expected some of do_sample"):
        read({"num_beams": 4})
