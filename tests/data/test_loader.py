"""A batch is a pure function of (seed, step), whatever the hosts; held-out passes count every token of every document once."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lmeff.core.errors import ConfigError, DataError
from lmeff.data.config import DataConfig, Part
from lmeff.data.loader import build, read_text


def equal(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def documents_of(dataset):
    return [np.asarray(s.tokens[a:b]) for s in dataset.shards for a, b in itertools.pairwise(s.starts)]


def bigrams(dataset):
    return Counter(pair for ids in documents_of(dataset) for pair in itertools.pairwise(ids.tolist()))


def test_batches_start_anywhere_and_are_the_same_after_a_restart(small):
    corpus, folder, config = small
    straight = list(itertools.islice(corpus.train.batches(0), 12))
    again = build(config, folder, 7, batch=4)
    for step, batch in enumerate(straight):
        assert equal(batch, again.train.batch(step))
    assert all(equal(a, b) for a, b in zip(itertools.islice(again.train.batches(5), 7), straight[5:], strict=True))
    assert equal(again.train.batch(10**9), corpus.train.batch(10**9))


def test_seeds_steps_splits_and_epochs_differ(small):
    corpus, folder, config = small
    other = build(config, folder, 8, batch=4)
    assert not equal(corpus.train.batch(0), other.train.batch(0))
    assert not equal(corpus.train.batch(0), corpus.train.batch(1))
    rows = len(corpus.train.rows[0])
    one = build(config, folder, 7, batch=1)
    first, second = ([one.train.drawn[e * rows + i][0][1] for i in range(rows)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(rows))
    assert first != second
    assert [other.train.drawn[i][0][1] for i in range(20)] != second[:20]


@pytest.mark.parametrize("hosts", [[range(4)], [range(2), range(2, 4)], [[3], [0, 2], [1]], [[0, 1], [0, 1], [2, 3]]])
def test_hosts_make_their_rows_alone(small, hosts):
    corpus = small.corpus
    streams = [corpus.train.batches(3, np.array(rows)) for rows in hosts]
    for step in (3, 4, 5):
        whole = corpus.train.batch(step)
        for rows, stream in zip(hosts, streams):
            assert equal(next(stream), [x[list(rows)] for x in whole])


def test_an_empty_batch_is_refused(small):
    with pytest.raises(ConfigError, match=r"train\.batch: got 0 rows, expected at least 1"):
        build(small.config, small.folder, 7, batch=0)


def test_an_epoch_predicts_every_token_once(small):
    _, folder, config = small
    train = build(config, folder, 7, batch=1).train
    seen = Counter()
    for step in range(len(train.rows[0])):
        batch = train.batch(step)
        counted = batch.weights > 0
        seen.update(zip(batch.tokens[counted].tolist(), batch.targets[counted].tolist()))
    assert seen == bigrams(train)
    assert seen.total() == train.tokens
    assert train.fill == train.tokens / (config.sequence * len(train.rows[0])) > 0.99


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_gives_back_every_document_in_order(small, split, batch):
    dataset = getattr(small.corpus, split)
    targets = [[] for _ in dataset.document_bytes]
    tokens = np.zeros(len(targets))
    for rows, document_BT in dataset.evaluation(batch):
        assert rows.tokens.shape == document_BT.shape == (batch, small.config.sequence)
        for document, target in zip(document_BT[rows.weights > 0], rows.targets[rows.weights > 0]):
            targets[document].append(int(target))
        np.add.at(tokens, document_BT[rows.weights > 0], rows.weights[rows.weights > 0])
    expected = documents_of(dataset)
    assert targets == [ids[1:].tolist() for ids in expected]
    assert tokens.tolist() == dataset.document_tokens.tolist() == [len(ids) - 1 for ids in expected]
    assert dataset.document_bytes.tolist() == [len(small.corpus.tokenizer.decode(ids).encode()) for ids in expected]


def mixture(tmp_path, weights, **changes):
    parts = []
    for name, weight in weights.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} {i * i}\n\n" for i in range(4000)))
        parts.append(Part(name=name, path=(str(tmp_path / f"{name}.txt"),), weight=weight))
    return DataConfig(**{"mixture": tuple(parts), "sequence": 32, **changes})


def test_mixture_weights_are_the_shares_of_rows(tmp_path):
    config = mixture(tmp_path, {"apple": 6.0, "berry": 3.0, "cherry": 1.0})
    corpus = build(config, tmp_path / "data", 0, batch=10)
    rows = [place for step in range(100) for place in corpus.train.drawn[step]]
    shares = np.bincount([part for part, _ in rows]) / len(rows)
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.002)
    for step in range(20):
        batch = corpus.train.batch(step)
        for (part, _), tokens in zip(corpus.train.drawn[step], batch.tokens):
            text = corpus.tokenizer.decode(tokens)
            named = {name for name in ("apple", "berry", "cherry") if name in text}
            assert named <= {config.mixture[part].name}
    assert equal(corpus.train.batch(77), build(config, tmp_path / "data", 0, batch=10).train.batch(77))


def test_documents_of_a_mixture_know_their_part(tmp_path):
    config = mixture(tmp_path, {"apple": 2.0, "berry": 1.0}, tokenizer="bpe", bpe_vocab=400)
    corpus = build(config, tmp_path / "data", 0, batch=4)
    texts = [corpus.tokenizer.decode(ids) for ids in documents_of(corpus.test)]
    assert set(corpus.test.document_part) == {0, 1}
    for part, text, size in zip(corpus.test.document_part, texts, corpus.test.document_bytes, strict=True):
        assert config.mixture[part].name in text
        assert len(text.encode()) == size
    tokens = np.zeros(len(texts))
    for batch, document_BT in corpus.test.evaluation(8):
        np.add.at(tokens, document_BT[batch.weights > 0], 1)
        for row, documents in zip(batch.tokens, document_BT):
            parts = set(corpus.test.document_part[documents[documents >= 0]])
            assert len(parts) <= 1
            assert all(config.mixture[part].name not in corpus.tokenizer.decode(row) for part in {0, 1} - parts)
    assert tokens.tolist() == [len(ids) - 1 for ids in documents_of(corpus.test)]
    assert "apple: " in corpus.describe()


def test_the_cap_is_shared_by_weight(tmp_path):
    config = mixture(tmp_path, {"apple": 3.0, "berry": 1.0}, max_bytes=80_000, validation=0.2, test=0.2)
    parts = build(config, tmp_path / "data", 0, batch=4).manifest["parts"]
    assert 58_000 < parts["apple"]["bytes"] <= 60_000
    assert 18_000 < parts["berry"]["bytes"] <= 20_000


def test_a_single_file_fills_all_splits(notes, tmp_path):
    corpus = build(DataConfig(path=(str(notes),), sequence=64), tmp_path / "data", 0, batch=8)
    texts = {
        s: [corpus.tokenizer.decode(ids) for ids in documents_of(getattr(corpus, s))]
        for s in ("train", "validation", "test")
    }
    assert all(len(found) > 5 for found in texts.values())
    everything = sorted(itertools.chain.from_iterable(texts.values()))
    assert len(set(everything)) == len(everything)
    assert sum(map(len, everything)) == len(notes.read_text(encoding="utf-8"))


def test_bpe_end_to_end(tmp_path):
    config = DataConfig(tokenizer="bpe", bpe_vocab=512, max_bytes=300_000, sequence=64)
    corpus = build(config, tmp_path / "data", 0, batch=4)
    assert corpus.vocab == 512
    assert (tmp_path / "data" / "tokenizer.json").exists()
    batch = corpus.train.batch(0)
    assert batch.tokens.max() < 512
    assert "bytes/token" in corpus.describe()
    rate = float(corpus.describe().split(" bytes/token")[0].split()[-1])
    assert 1.5 < rate < 4
    again = build(config, tmp_path / "data", 0, batch=4)
    text = "def main() -> None:  # ünïcode\n"
    assert np.array_equal(again.tokenizer.encode(text), corpus.tokenizer.encode(text))
    assert again.tokenizer.decode(again.tokenizer.encode(text)) == text


def test_description_is_one_line_of_facts(small):
    corpus = small.corpus
    line = corpus.describe()
    assert "\n" not in line
    documents = sum(len(split.document_bytes) for split in (corpus.train, corpus.validation, corpus.test))
    for fact in (
        "standard library of Python",
        f"{documents} documents",
        f"train {corpus.train.tokens:,}",
        "vocab 264",
        "1.0",
    ):
        assert fact in line


def test_other_text_is_read_with_the_same_tokenizer(small, notes):
    corpus, folder = small[:2]
    before = sorted(folder.parent.rglob("*"))
    other = read_text([str(notes)], corpus)
    whole = "".join(corpus.tokenizer.decode(ids) for ids in documents_of(other))
    assert whole == notes.read_text(encoding="utf-8")
    counted = sum(float(batch.weights.sum()) for batch, _ in other.evaluation(4))
    assert counted == other.tokens == len(whole.encode()) + len(other.document_bytes)
    assert sorted(folder.parent.rglob("*")) == before
    with pytest.raises(DataError, match="does not exist"):
        read_text(["absent.txt"], corpus)
