"""Generation: what comes out is what the whole row's logits say, row by row."""

import dataclasses

import numpy as np
import pytest

from lmeff.core.errors import ConfigError, UsageError
from lmeff.data.tokenizer import ByteTokenizer
from lmeff.infer.generate import generate
from lmeff.infer.sampling import GREEDY, Sampling
from lmeff.models.cache import CacheFormat
from lmeff.models.config import preset
from tests.infer.tiny import MODELS, full_logits, rows, served

F32 = CacheFormat(numbers="float32")
PROMPTS = [rows(64, 1, n, seed=n)[0] for n in (3, 7, 1)]
STEPS = 6


def greedy_oracle(model, prompt, steps):
    """Token by token from whole rows, padded to one length; and the log-probability of each."""
    ids, logprobs = list(prompt), []
    for _ in range(steps):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        logits = full_logits(model, padded)[0, len(ids) - 1].astype(np.float64)
        ids.append(int(logits.argmax()))
        logprobs.append(logits.max() - np.log(np.exp(logits).sum()))
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def oracle():
    model = served(MODELS["gqa-untied"])
    return [greedy_oracle(model, prompt, STEPS) for prompt in PROMPTS]


@pytest.mark.parametrize("mesh", ["one", "data4-tensor2"])
def test_greedy_text_is_that_of_whole_rows(mesh, oracle):
    made = generate(served(MODELS["gqa-untied"], mesh), PROMPTS, max_tokens=STEPS, sampling=GREEDY, cache=F32)
    for completion, (ids, logprobs) in zip(made, oracle, strict=True):
        assert completion.ids.tolist() == ids
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
        assert completion.reason == "length"
        assert completion.text is None


def test_a_row_is_drawn_alike_in_any_batch():
    model, how = served(MODELS["gqa-untied"]), Sampling(temperature=1.5, top_k=40, seed=5)
    together = generate(model, PROMPTS, max_tokens=STEPS, sampling=how, cache=F32)
    in_turn = generate(model, PROMPTS, max_tokens=STEPS, sampling=how, cache=F32, batch=1)
    again = dataclasses.replace(how, seed=6)
    other = generate(model, PROMPTS, max_tokens=STEPS, sampling=again, cache=F32)
    alike = generate(model, [PROMPTS[1]] * 3, max_tokens=STEPS, sampling=how, cache=F32)
    assert [c.ids.tolist() for c in together] == [c.ids.tolist() for c in in_turn]
    assert [c.ids.tolist() for c in together] != [c.ids.tolist() for c in other]
    assert alike[0].ids.tolist() != alike[2].ids.tolist()  # each row draws for itself
    assert alike[1].ids.tolist() == together[1].ids.tolist()


def test_rows_end_at_stop_ids(oracle):
    model = served(MODELS["gqa-untied"])
    stop = oracle[0][0][2]
    made = generate(model, PROMPTS, max_tokens=STEPS, sampling=GREEDY, cache=F32, stop_ids=[stop])
    for completion, (ids, _) in zip(made, oracle, strict=True):
        end = ids.index(stop) + 1 if stop in ids else STEPS
        assert completion.ids.tolist() == ids[:end]
        assert len(completion.logprobs) == end
        assert completion.reason == ("stop_id" if stop in ids else "length")


def test_text_is_streamed_and_ends_at_stop_strings():
    model = served(preset("tiny", vocab=264))
    decoder = ByteTokenizer().decode
    prompts = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"ab", b"xyz")]
    told = []
    plain = generate(
        model,
        prompts,
        max_tokens=12,
        sampling=Sampling(seed=1, top_k=90),
        cache=F32,
        decoder=decoder,
        on_token=lambda *x: told.append(x),
    )
    for row, completion in enumerate(plain):
        assert [id for i, id, _ in told if i == row] == completion.ids.tolist()
        assert "".join(text for i, _, text in told if i == row) == completion.text
    stop = plain[0].text[4:7]
    ended = generate(
        model,
        prompts,
        max_tokens=12,
        sampling=Sampling(seed=1, top_k=90),
        cache=F32,
        decoder=decoder,
        stop_texts=[stop],
    )
    assert ended[0].reason == "stop_text"
    assert ended[0].text == plain[0].text[: plain[0].text.index(stop)]
    assert ended[0].ids.tolist() == plain[0].ids[: len(ended[0].ids)].tolist()
    assert len(ended[0].ids) < 12


@pytest.mark.parametrize(
    ("prompts", "how", "error", "said"),
    [
        ([np.array([], np.int32)], {}, UsageError, "prompt 0: got an array"),
        ([np.array([1]), np.array([64])], {}, UsageError, "prompt 1: got ids from 64 to 64, expected 0 to 63"),
        ([np.array([1.5])], {}, UsageError, "prompt 0: got an array of float64"),
        ([np.array([1])], {"max_tokens": 0}, UsageError, "max_tokens: got 0"),
        ([np.array([1])], {"stop_texts": ["a"]}, UsageError, "stop_texts: got strings without a decoder"),
        ([np.array([1])], {"stop_texts": [""], "decoder": str}, UsageError, "stop_texts: got an empty string"),
    ],
    ids=["empty", "beyond-the-vocabulary", "floats", "no-tokens", "no-decoder", "empty-stop"],
)
def test_what_cannot_be_continued_is_refused(prompts, how, error, said):
    with pytest.raises(error, match=said):
        generate(served(preset("tiny")), prompts, **{"max_tokens": 4, "sampling": GREEDY, "cache": F32, **how})


def test_rows_longer_than_the_models_positions_are_refused():
    model = served(preset("tiny", context=8))
    with pytest.raises(
        ConfigError, match=r"prompt and max_tokens: got 9 tokens a row, expected at most model\.context = 8"
    ):
        generate(model, [np.arange(5)], max_tokens=4, sampling=GREEDY, cache=F32)


def test_no_prompts_are_no_completions():
    assert generate(served(preset("tiny")), [], max_tokens=4, sampling=GREEDY, cache=F32) == []
