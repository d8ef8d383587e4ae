"""A small corpus from the standard library, built once, with what it should hold computed by hand."""

import pytest

from lmeff.data.config import DataConfig
from lmeff.data.loader import build

SMALL = DataConfig(max_bytes=400_000, sequence=48)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(corpus, folder) of `SMALL` with batches of 4."""
    folder = tmp_path_factory.mktemp("small") / "data"
    return build(SMALL, folder, 7, batch=4), folder


@pytest.fixture
def notes(tmp_path):
    """A text file of some 120 kB whose paragraphs are all different."""
    file = tmp_path / "notes.txt"
    file.write_text(
        "".join(f"Paragraph {i}: naïve café {i * i}.\nSecond line {i % 7}.\n\n" for i in range(2500)), encoding="utf-8"
    )
    return file
