"""What stands before an imported model: `model.json`, with its shape, where it came from, and the digests of all that lies beside it.

OUT/model.json    this header; its own digest names the model
OUT/artifact/     the parameters as a checkpoint with digests (`train/checkpoint.py`)
OUT/tokenizer/    a copy of the tokenizer's files, where there is one (`data/pretrained.py`)
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmeff
from lmeff.core.errors import CheckpointError
from lmeff.core.files import sha256, write_text
from lmeff.models.config import ModelConfig, read

FILE, ARTIFACT, TOKENIZER = "model.json", "artifact", "tokenizer"
SEALS = f"{ARTIFACT}/0/SHA256SUMS"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """A model at rest.

    family: the model_type of Hugging Face, or "llama2.c". dtype: of the parameters as stored. origin: the place it was imported from.
    keep:   keys of its config.json that change nothing here and that an export carries over, such as ids of special tokens.
    files:  SHA-256 by path of the tokenizer's files and of the list of sums that seals the parameters.
    """

    cfg: ModelConfig
    family: str
    dtype: str
    origin: str
    keep: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def write_header(header: Header, folder: Path) -> None:
    """Writes `model.json` with the digests of what lies in `folder`; the last file that is written."""
    beside = sorted(path for path in (folder / TOKENIZER).rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in (folder / SEALS, *beside)}
    body = {"version": VERSION, "lmeff": lmeff.__version__, **dataclasses.asdict(header), "files": files}
    text = json.dumps({**body, "sha256": _seal(body)}, indent=1) + "\n"
    write_text(folder / FILE, text)


def read_header(folder: Path) -> Header:
    """Reads it back; raises `CheckpointError` where it is damaged, where a file beside it is, or where another version wrote it."""
    file = folder / FILE
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        expected = found.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error!r}), expected what `lmeff import` wrote; {AGAIN}"
        ) from error
    if _seal(found) != expected:
        raise CheckpointError(f"{file}: is damaged: sha256 {_seal(found)}, expected {expected}; {AGAIN}")
    if found["version"] > VERSION:
        raise CheckpointError(f"{file}: has format {found['version']}, this lmeff reads up to {VERSION}; update lmeff")
    for path, digest in found["files"].items():
        if not (folder / path).is_file() or sha256(folder / path) != digest:
            raise CheckpointError(
                f"{folder / path}: is missing or damaged, expected a file with sha256 {digest}; {AGAIN}"
            )
    return Header(
        cfg=read(found["cfg"]),
        family=found["family"],
        dtype=found["dtype"],
        origin=found["origin"],
        keep=found["keep"],
        files=found["files"],
    )


def is_model_folder(folder: Path) -> bool:
    """Whether `lmeff import` wrote it."""
    return (folder / FILE).is_file()


def identity(folder: Path) -> str:
    """The same for the same model: the digest of its header, which has the digests of all else."""
    return sha256(folder / FILE)


def _seal(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


AGAIN = "import it again"
