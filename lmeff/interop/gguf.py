"""GGUF files, which llama.cpp and what is built on it read: one file of metadata, tensors and, where it is given, the tokenizer.

The package `gguf` (https://github.com/ggml-org/llama.cpp/tree/master/gguf-py) writes the container, names the tensors and rounds to blocks. What is left to do
here: the model as an architecture of llama.cpp (`gguf_architectures.py`), every leaf as matrices [out, in], and the codes of packed leaves, which are kept
where a type of block can hold them:

| leaf | its tensors |
|---|---|
| norms, biases | F32 |
| matrices in floating point | the type asked for: F32, F16, BF16, or blocks of 32 inputs in Q8_0 or Q4_0, rounded by the package |
| packed symmetric integers, groups of multiples of 32 inputs or fewer scales | codes kept, up to 4 bits in Q4_0, up to 8 in Q8_0; scales become float16 |
| packed otherwise (affine, fp8, smaller groups) | numbers, rounded anew to the type asked for |

With Q4_0 the table and the head are Q8_0. Rows that are no multiple of 32 cannot be cut into blocks: such matrices are F16. `export` tells what became of each.
"""

import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.extras import require
from lmeff.core.numerics import QTensor, is_qtensor, unpaired
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten
from lmeff.interop.gguf_architectures import ARCHITECTURES, TENSORS, architecture_of, metadata, rope_factors
from lmeff.interop.gguf_tokenizer import add_tokenizer
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
BLOCK = 32  # inputs that share a scale in Q8_0 and Q4_0
ENDS = ("embed/table", "head/w")


class Row(NamedTuple):
    """What became of a leaf: `kind` is the type of its tensors, `how` tells what was rounded."""

    path: str
    kind: str
    how: str


def export(
    cfg: ModelConfig,
    params: Tree,
    file: Path,
    *,
    kind: str = "Q8_0",
    tokenizer: Path | None = None,
    pretokenizer: str | None = None,
    name: str = "lmeff",
) -> tuple[Row, ...]:
    """Writes the model as one GGUF file and tells what became of every leaf. The file appears whole or not at all.

    params:       arrays or packed leaves, all of them on this host's devices.
    kind:         one of `TYPES`, for matrices that are not packed.
    tokenizer:    a folder with tokenizer.model (SentencePiece) or tokenizer.json (byte-level BPE) and what lies beside it. Without one the file has no
                  vocabulary, and llama.cpp takes and gives ids of tokens alone.
    pretokenizer: llama.cpp's name for how a byte-level tokenizer cuts text ("llama-bpe", "gpt-2", ...); None where the architecture settles it.

    Raises `ConfigError` for models that no architecture of llama.cpp computes, `CheckpointError` where the file cannot be written.
    """
    gguf = require("gguf", extra="gguf")
    if kind not in TYPES:
        raise ConfigError(f"GGUF: got the type '{kind}', expected one of {', '.join(TYPES)}")
    architecture = architecture_of(cfg)
    leaves = {path: unpaired(x) if is_qtensor(x) else x for path, x in flatten(params).items()}
    specs = flatten(param_specs(cfg))
    if unknown := sorted(leaves.keys() ^ specs.keys() | leaves.keys() - TENSORS.keys()):
        raise ConfigError(f"GGUF: got the leaf '{unknown[0]}', expected those of {architecture}: nothing is written")
    rows = tuple(_row(path, leaves[path], spec, kind) for path, spec in specs.items())
    part = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(None, architecture)
    _add_metadata(gguf, writer, cfg, architecture, kind, name)
    add_tokenizer(gguf, writer, cfg, tokenizer, pretokenizer or ARCHITECTURES[architecture].pretokenizer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(gguf, writer, part, _tensors(gguf, cfg, leaves, specs, rows, architecture))
        os.replace(part, file)
    except OSError as error:
        raise CheckpointError(
            f"{file}: could not be written ({error.strerror}); nothing is left of it. See that its disk has room and may be written."
        ) from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # where nothing could be made there is nothing to remove
            part.unlink()
    return rows


def _row(path: str, leaf: Any, spec: ParamSpec, kind: str) -> Row:
    if not spec.is_matmul:
        return Row(path, "F32", "as it was")
    inputs = int(np.prod([spec.shape[axis] for axis in spec.axes]))
    if is_qtensor(leaf):
        own = block_kind(leaf, spec)
        if own is not None:
            return Row(path, own, f"codes of {leaf.format} kept, scales rounded to float16")
    kind = "Q8_0" if kind == "Q4_0" and path in ENDS else kind
    kind = "F16" if kind.startswith("Q") and inputs % BLOCK else kind
    was = f"values of {leaf.format} " if is_qtensor(leaf) else ""
    return Row(
        path, kind, (was + ("as they were" if was else "as it was")) if kind == "F32" else f"{was}rounded to {kind}"
    )


def block_kind(t: QTensor, spec: ParamSpec) -> str | None:
    """The type of block that holds the codes of a packed leaf as they are; None where none does."""
    format = t.format
    last = spec.shape[spec.axes[-1]]
    whole = int(np.prod([spec.shape[axis] for axis in spec.axes])) % BLOCK == 0
    if format.granularity == "group":
        assert format.group is not None
        several = len(spec.axes) > 1  # groups begin anew with every head
        group = min(format.group, last)
        whole = whole and group % BLOCK == 0 and (last % BLOCK == 0 or not several)
    if format.is_float or not format.symmetric or not whole:
        return None
    return "Q4_0" if format.bits <= 4 else "Q8_0"


def _tensors(
    gguf: ModuleType,
    cfg: ModelConfig,
    leaves: dict[str, Any],
    specs: dict[str, ParamSpec],
    rows: tuple[Row, ...],
    architecture: str,
) -> list[tuple[str, str, tuple[int, ...], Any]]:
    """(name, type, shape, a function that gives the bytes) of every tensor."""
    found = []
    factors = rope_factors(cfg)
    if factors is not None:
        found.append((_name(gguf, architecture, "ROPE_FREQS", "weight"), "F32", factors.shape, lambda: factors))
    for row in rows:
        leaf, spec = leaves[row.path], specs[row.path]
        tensor, suffix = TENSORS[row.path]
        turned = ARCHITECTURES[architecture].interleaved and tensor in ("ATTN_Q", "ATTN_K")
        heads = (cfg.heads if tensor == "ATTN_Q" else cfg.kv_heads) if turned else None
        lift = cfg.norm_plus_one and row.path.endswith("norm/scale")
        for layer in range(cfg.layers) if spec.stacked else (None,):
            name = _name(gguf, architecture, tensor, suffix, layer)
            read = _Reader(gguf, leaf, spec, layer, row.kind, heads, lift)
            found.append((name, row.kind, _shape(spec), read))
    return found


class _Reader(NamedTuple):
    """Gives one tensor's bytes when its turn comes."""

    gguf: ModuleType
    leaf: Any
    spec: ParamSpec
    layer: int | None
    kind: str
    heads: int | None
    lift: bool

    def __call__(self) -> np.ndarray:
        leaf = self.leaf
        if is_qtensor(leaf):
            one = _on_host(leaf, self.layer)
            if block_kind(leaf, self.spec) == self.kind:
                codes, scale = _matrix(one.q, self.spec), _matrix(_spread(one.scale, one), self.spec)
                return pack_blocks(_interleave(codes, self.heads), _interleave(scale, self.heads), self.kind)
            values = _values(one)
        else:
            values = np.asarray(leaf if self.layer is None else leaf[self.layer])
        values = _interleave(_matrix(values, self.spec).astype(np.float32), self.heads)
        values = values + 1 if self.lift else values
        return self.gguf.quants.quantize(np.ascontiguousarray(values), self.gguf.GGMLQuantizationType[self.kind])


def _on_host(t: QTensor, layer: int | None) -> QTensor:
    """One layer's packed leaf in NumPy."""
    parts = (None if x is None else np.asarray(x if layer is None else x[layer]) for x in (t.q, t.scale, t.zero))
    q, scale, zero = parts
    return QTensor(q, scale, zero, t.format, t.axes, t.dtype)


def _spread(scale: np.ndarray, t: QTensor) -> np.ndarray:
    """A scale (or zero) for every value."""
    if t.format.granularity == "group":
        axis = t.ndim + t.axes[-1]
        scale = np.repeat(scale, t.format.group or 1, axis=axis).take(range(t.shape[axis]), axis=axis)
    return np.broadcast_to(scale, t.shape)


def _values(t: QTensor) -> np.ndarray:
    """As `numerics.dequantize`, on the host: one layer of a model needs no device."""
    steps = t.q.astype(np.float32)
    steps = steps if t.zero is None else steps - _spread(t.zero, t).astype(np.float32)
    return (steps * _spread(t.scale, t)).astype(np.dtype(t.dtype))


def _shape(spec: ParamSpec) -> tuple[int, ...]:
    """Of a leaf's matrix [out, in], or of a vector."""
    letters = spec.letters.removeprefix("L")
    sizes = dict(zip(spec.letters, spec.shape, strict=True))
    outer = int(np.prod([sizes[letter] for letter in letters if letter not in spec.contract]))
    return (outer, int(np.prod([sizes[letter] for letter in spec.contract]))) if spec.is_matmul else (outer,)


def _matrix(x: Any, spec: ParamSpec) -> np.ndarray:
    """One layer's leaf as [out, in], the contracted letters last; a norm or a bias as a vector."""
    letters = spec.letters.removeprefix("L")
    order = [i for i, letter in enumerate(letters) if letter not in spec.contract]
    order += [letters.index(letter) for letter in spec.contract]
    return np.asarray(x).transpose(order).reshape(_shape(spec))


def _interleave(x: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of each head so that channels i and i + C / 2, which turn together here, become 2i and 2i + 1."""
    if heads is None:
        return x
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def pack_blocks(codes: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
    """Codes and their scales [out, in] as the bytes of Q4_0 or Q8_0, uint8 [out, bytes]: of every 32 a float16 scale and the codes.

    Q4_0 stores codes 8 higher, the first 16 of a block in the low halves of 16 bytes and the others in the high ones.
    """
    outputs, inputs = codes.shape
    blocks = codes.astype(np.int8).reshape(outputs, inputs // BLOCK, BLOCK)
    steps = scale.reshape(outputs, -1, BLOCK)[..., :1].astype(np.float16).view(np.uint8)
    if kind == "Q4_0":
        raised = (blocks + np.int8(8)).view(np.uint8)
        stored = raised[..., : BLOCK // 2] | (raised[..., BLOCK // 2 :] << 4)
    else:
        stored = blocks.view(np.uint8)
    return np.concatenate([steps, stored], axis=-1).reshape(outputs, -1)


def _name(gguf: ModuleType, architecture: str, tensor: str, suffix: str, layer: int | None = None) -> str:
    """llama.cpp's name of a tensor, by the package's tables."""
    return f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[tensor]].format(bid=layer)}.{suffix}"


def _add_metadata(gguf: ModuleType, writer: Any, cfg: ModelConfig, architecture: str, kind: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata(cfg, architecture).items():
        add[type(value)](f"{architecture}.{key}", value)


def _write(gguf: ModuleType, writer: Any, file: Path, tensors: list[tuple[str, str, tuple[int, ...], Any]]) -> None:
    """The container, one tensor in memory at a time."""
    for name, kind, shape, _ in tensors:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        count = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, _, read in tensors:
        writer.write_tensor_data(np.ascontiguousarray(read()))
