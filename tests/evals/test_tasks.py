"""Accuracies, likelihoods, boundaries and truncation against the model in NumPy float64 and against a count by hand."""

import json

import numpy as np
import pytest

from lmeff.core.errors import DataError
from lmeff.data.tokenizer import train_bpe
from lmeff.evals.tasks import compare, encode_pairs, likelihoods, read_items, run_task
from tests.evals.scored import TOKENIZER, log_probabilities, plain_scorer

WORDS = ("cat", "a dog", "été", "no", "the whole of it", "x")


def questions(count=12):
    rng = np.random.default_rng(3)
    rows = []
    for i in range(count):
        choices = [str(word) for word in rng.choice(WORDS, size=2 + i % 3, replace=False)]
        rows.append({"query": f"Q{i}: " * (i % 4), "choices": choices, "gold": int(rng.integers(len(choices)))})
    return rows


def written(tmp_path, rows, name="items.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return file


def nats_of(context, ending, seed=0, bos=True):
    """By hand: bytes need no boundary."""
    ids = [*([TOKENIZER.bos] if bos or not context.strip() else []), *context.encode(), *ending.encode()]
    rows = log_probabilities(plain_scorer(seed=seed).served, ids)
    n = len(ending.encode())
    logp = rows[np.arange(len(ids) - 1), ids[1:]][-n:]
    return -logp.sum(), bool((rows.argmax(-1) == ids[1:])[-n:].all())


def test_multiple_choice_by_hand(tmp_path):
    rows = questions()
    result = run_task(plain_scorer(), TOKENIZER, read_items(written(tmp_path, rows)))
    right = {name: [] for name in result.metrics}
    for row, nats in zip(rows, result.nats, strict=True):
        context = row["query"].rstrip()
        spaces = row["query"][len(context) :]
        wanted = np.array([nats_of(context, f"{spaces} {choice}")[0] for choice in row["choices"]])
        np.testing.assert_allclose(nats, wanted, rtol=1e-4)
        size = [len(choice.encode()) for choice in row["choices"]]
        per = {"acc": np.ones(len(wanted)), "acc_norm": [len(c) for c in row["choices"]], "acc_bytes": size}
        per["acc_tokens"] = np.array(size) + 1 + len(spaces)
        for name, length in per.items():
            right[name].append(int(np.argmax(-wanted / length)) == row["gold"])
    for name, values in right.items():
        np.testing.assert_array_equal(result.metrics[name].values, values)
    assert len({tuple(values) for values in right.values()}) > 1  # the normalisations do not all choose alike
    summary = result.summary()
    assert summary["acc"]["value"] == pytest.approx(np.mean(right["acc"]))
    assert summary["acc"]["interval"][0] <= summary["acc"]["value"] <= summary["acc"]["interval"][1]
    assert (summary["items"], summary["truncated"]) == (12, 0)


def test_continuations_by_hand(tmp_path):
    rows = [{"context": "", "continuation": "one"}, {"context": "two", "continuation": " three"}]
    greedy = chr(log_probabilities(plain_scorer().served, [TOKENIZER.bos, *b"say", 0])[-1][:128].argmax())
    rows.append({"context": "say", "continuation": greedy})
    result = run_task(plain_scorer(), TOKENIZER, read_items(written(tmp_path, rows)))
    wanted = [nats_of(row["context"], row["continuation"]) for row in rows]
    np.testing.assert_allclose([nats for (nats,) in result.nats], [nats for nats, _ in wanted], rtol=1e-4)
    np.testing.assert_array_equal(result.metrics["acc"].values, [match for _, match in wanted])
    summary = result.summary()
    assert summary["nats"]["value"] == pytest.approx(np.mean([nats for nats, _ in wanted]), rel=1e-4)
    assert summary["nats_per_token"]["value"] == pytest.approx(sum(nats for nats, _ in wanted) / (3 + 6 + 1), rel=1e-4)


def test_a_greedy_ending_counts():
    served = plain_scorer().served
    ids = [TOKENIZER.bos, *b"say"]
    for _ in range(3):
        ids.append(int(log_probabilities(served, [*ids, 0])[-1].argmax()))
    (pair,) = encode_pairs(TOKENIZER, [("say", "?")])
    ending = np.array(ids[4:], np.int32)
    wrong = ending.copy()
    wrong[1] = (wrong[1] + 1) % 256
    found = likelihoods(plain_scorer(), [pair._replace(ending=ending), pair._replace(ending=wrong)], ["", ""])
    assert [one.greedy for one in found] == [True, False]


class Bare:
    """A tokenizer whose prompts begin with nothing, as GPT-2's."""

    prefix = ()

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_the_boundary_is_that_of_the_whole():
    bpe = train_bpe(["the cat sat on the mat. " * 20], 270)
    (with_space,) = encode_pairs(bpe, [("the", " cat")])
    (moved,) = encode_pairs(bpe, [("the ", "cat")])
    bare_bpe = Bare(bpe)
    (bare,) = encode_pairs(bare_bpe, [("the ", "cat")])
    whole = bpe.encode("the cat")
    for pair in (with_space, moved):
        np.testing.assert_array_equal(np.concatenate(pair), [bpe.bos, *whole])
        assert bpe.decode(pair.ending) == " cat"
    np.testing.assert_array_equal(np.concatenate(bare), whole)
    assert len(bpe.encode(" cat")) == len(bpe.encode("cat"))  # or the space would not matter
    (empty,) = encode_pairs(bare_bpe, [("", "the")])
    np.testing.assert_array_equal(empty.context, [bpe.bos])


def test_long_contexts_lose_their_left_and_are_counted(tmp_path):
    rows = [{"context": "z" * n, "continuation": " end"} for n in (200, 3, 61, 60)]
    result = run_task(plain_scorer(), TOKENIZER, read_items(written(tmp_path, rows)))
    assert result.truncated == 2  # bos + 60 + 4 ids are 65, what a row of 64 inputs holds
    cut = "z" * 61 + " end"
    assert result.nats[0][0] == pytest.approx(nats_of(cut[:61], cut[61:], bos=False)[0], rel=1e-4)
    assert result.nats[3][0] == pytest.approx(nats_of("z" * 60, " end")[0], rel=1e-4)


def test_an_ending_longer_than_a_row_is_refused(tmp_path):
    file = written(tmp_path, [{"context": "a", "continuation": "b" * 65}])
    with pytest.raises(DataError, match=r"items.jsonl, line 1: the ending has 65 tokens, expected 1 to 64"):
        run_task(plain_scorer(), TOKENIZER, read_items(file))


def test_models_are_compared_item_by_item(tmp_path):
    items = read_items(written(tmp_path, questions()))
    a, b = (run_task(plain_scorer(seed=seed), TOKENIZER, items) for seed in (0, 1))
    differences = compare(a, b)
    for name, (mean, low, high) in differences.items():
        assert mean == pytest.approx(a.summary()[name]["value"] - b.summary()[name]["value"])
        assert low <= mean <= high
    assert differences.keys() == {"acc", "acc_norm", "acc_bytes", "acc_tokens"}
    assert set(compare(a, a).values()) == {(0, 0, 0)}
    other = run_task(plain_scorer(), TOKENIZER, items[:5])
    with pytest.raises(DataError, match="different items"):
        compare(a, other)


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}
BAD = {
    "no JSON": ("{", "is no JSON"),
    "a list": ("[1]", "got a JSON list"),
    "fields": ({"query": "q"}, r"got the fields \['query'\]"),
    "gold too large": ({**GOOD, "gold": 2}, "gold is 2, expected .* 0 to 1"),
    "gold a bool": ({**GOOD, "gold": True}, "gold is True"),
    "gold a text": ({**GOOD, "gold": "a"}, "gold is 'a'"),
    "one choice": ({**GOOD, "choices": ["a"]}, "expected a list of two texts"),
    "choices a text": ({**GOOD, "choices": "ab"}, "choices is 'ab'"),
    "a number": ({**GOOD, "choices": ["a", 1]}, "hold 1, expected texts"),
    "an empty choice": ({**GOOD, "choices": ["a", ""]}, "a choice is empty"),
    "an empty continuation": ({"context": "a", "continuation": ""}, "continuation is empty"),
    "another kind": ({"context": "a", "continuation": "b"}, "is of another kind than .*line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_one_error_with_its_place(tmp_path, case):
    line, word = BAD[case]
    with pytest.raises(DataError, match=word) as told:
        read_items(written(tmp_path, [GOOD, "", line]))
    assert f"{tmp_path}/items.jsonl, line 3: " in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{}"])
def test_files_without_items_are_refused(tmp_path, content):
    file = tmp_path / "items.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"items.jsonl: (holds no item|cannot be read)"):
        read_items(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "absent.jsonl")
