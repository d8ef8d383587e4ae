"""Text that a run was not made from, as a split to measure on: read with the run's tokenizer, kept in memory."""

from collections.abc import Sequence

import numpy as np

from lmeff.core.errors import DataError
from lmeff.data import packing
from lmeff.data.config import DataConfig, Part
from lmeff.data.loader import Corpus, Dataset
from lmeff.data.shards import Count, Shard, dtype, read


def held_out_text(corpus: Corpus, config: DataConfig, paths: Sequence[str]) -> Dataset:
    """All documents of these files or folders, for `Dataset.evaluation`; raises `DataError` where there is none."""
    part = Part(name="text", path=tuple(paths), text_field=config.text_field)
    found = list(read(part, config.max_bytes, Count()))
    if not found:
        raise DataError(f"text: got {list(paths)}, which hold no text; expected at least one document that is not blank")
    tokenizer = corpus.tokenizer
    documents = [
        np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]])
        for ids in tokenizer.encode_batch([document.text for document in found])
    ]
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])])
    sizes = np.array([len(document.text.encode()) for document in found], dtype=np.int64)
    shard = Shard(np.concatenate(documents).astype(dtype(config)), starts, sizes)
    return Dataset(
        shards=(shard,),
        rows=(packing.pack_ordered(packing.cut(starts, config.sequence), config.sequence),),
        drawn=(),
        sequence=config.sequence,
        pad=config.pad,
        host=slice(None),
        document_bytes=sizes,
        document_part=np.zeros(len(sizes), np.int64),
    )
