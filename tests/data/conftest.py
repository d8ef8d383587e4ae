"""A small corpus from the standard library, built once; and a file of the user's own."""

from pathlib import Path
from typing import NamedTuple

import pytest

from lmeff.data.config import DataConfig
from lmeff.data.loader import Corpus, build


class Small(NamedTuple):
    corpus: Corpus
    folder: Path
    config: DataConfig


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Built with seed 7 and batches of 4."""
    folder = tmp_path_factory.mktemp("small") / "data"
    config = DataConfig(max_bytes=400_000, sequence=48)
    return Small(build(config, folder, 7, batch=4), folder, config)


@pytest.fixture
def notes(tmp_path):
    """A text file of some 120 kB whose paragraphs are all different."""
    file = tmp_path / "notes.txt"
    file.write_text(
        "".join(f"Paragraph {i}: naïve café {i * i}.\nSecond line {i % 7}.\n\n" for i in range(2500)), encoding="utf-8"
    )
    return file
