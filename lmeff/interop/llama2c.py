"""llama2.c's model files, versions 0, 1 and 2 (https://github.com/karpathy/llama2.c, export.py, run.c, runq.c). `lmeff.data.scored_bpe` reads its tokenizers.

A header of seven whole numbers, then matrices [out, in] back to back: there are no names in the file, so its size must be what the header says to the byte.
Rotary pairs are neighbours there (channels 2i and 2i + 1) and half a head apart here: the rows of queries and keys are put in that order.
"""

import functools
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import QFormat, QTensor
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import map_with_path
from lmeff.interop.container import TensorInfo, refuse, refuse_other_kinds
from lmeff.interop.place import place_leaf
from lmeff.interop.tensors import Tensors
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import WHOLE, Layout

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = 256  # of versions 1 and 2
NUMBERS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
LIMIT = 1 << 24  # no size of a real model comes near it

F32, I8 = np.dtype(np.float32), np.dtype(np.int8)


class Model(NamedTuple):
    """What a file holds: tensors by llama2.c's names, those of a layer with its number ("wq.3"). group: numbers that share a scale (version 2), or None."""

    cfg: ModelConfig
    version: int
    group: int | None
    tensors: Tensors


def read_file(file: Path) -> Model:
    """Reads the header and finds the tensors; raises `CheckpointError` where the header and the size of the file do not agree."""
    file = Path(file)
    try:
        with file.open("rb") as stream:
            size, first = os.fstat(stream.fileno()).st_size, stream.read(HEADER_BYTES)
    except OSError as error:
        refuse(file, f"'{error.strerror}'", "a model file of llama2.c", "Check the path.")
    refuse_other_kinds(file, first, "a model file of llama2.c")
    if len(first) < 28:
        refuse(file, f"{len(first)} bytes", "a model file of llama2.c, which begins with seven whole numbers")
    version, numbers, tied, group, start = _header(file, first)
    cfg = _config(file, numbers, tied)
    infos: dict[str, TensorInfo] = {}
    for name, shape, dtype in _contents(file, cfg, version, group):
        infos[name] = TensorInfo(shape, dtype, file, start)
        start += infos[name].nbytes
    if start != size:
        refuse(file, f"{size:,} bytes", f"{start:,}: its header says {dict(zip(NUMBERS, numbers))}, version {version}")
    return Model(cfg, version, group, Tensors(infos, {}))


def _header(file: Path, first: bytes) -> tuple[int, tuple[int, ...], bool, int | None, int]:
    """Version, the seven numbers, whether the head is the embedding, the group of the scales, where the tensors begin."""
    if int.from_bytes(first[:4], "little") != MAGIC:
        numbers = struct.unpack("<7i", first[:28])
        return 0, (*numbers[:5], abs(numbers[5]), numbers[6]), numbers[5] > 0, None, 28  # a negative vocab: not tied
    if len(first) < HEADER_BYTES:
        refuse(file, f"{len(first)} bytes", f"a header of {HEADER_BYTES}")
    version, *numbers, tied, group = struct.unpack("<8iBi", first[4:41])
    if version not in (1, 2):
        refuse(file, f"version {version}", "0, 1 or 2", "Export it again in one of these.")
    if tied not in (0, 1) or (version == 2 and group < 1):
        refuse(file, f"shared_classifier {tied} and group size {group}", "0 or 1, and at least 1")
    return version, tuple(numbers), bool(tied), group if version == 2 else None, HEADER_BYTES


def _config(file: Path, numbers: Sequence[int], tied: bool) -> ModelConfig:
    named = dict(zip(NUMBERS, numbers))
    if not all(1 <= n <= LIMIT for n in numbers) or named["dim"] % named["n_heads"]:
        refuse(
            file,
            f"the header {named}",
            "sizes from 1, and a dim that n_heads divides",
            "This is no model file of llama2.c.",
        )
    try:
        return ModelConfig(
            vocab=named["vocab_size"],
            width=named["dim"],
            layers=named["n_layers"],
            heads=named["n_heads"],
            kv_heads=named["n_kv_heads"],
            ffn=named["hidden_dim"],
            norm_eps=1e-5,
            context=named["max_seq_len"],
            rope_theta=10_000.0,
            tied=tied,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: got the header {named}, expected that of a model ({error}).") from error


def _contents(
    file: Path, cfg: ModelConfig, version: int, group: int | None
) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any]]]:
    """(name, shape, dtype) of everything in the file, in its order."""
    shapes = _shapes(cfg)
    for name in ORDER_0 if version == 0 else ORDER_1:
        if name == "output" and cfg.tied:
            continue
        for own in [f"{name}.{i}" for i in range(cfg.layers)] if name in PER_LAYER else [name]:
            if group is None or name in NORMS:
                yield own, shapes[name], F32
                continue
            count = math.prod(shapes[name])
            if count % group:
                refuse(file, f"groups of {group} in {own} of {count:,} numbers", "a divisor")
            yield own, shapes[name], I8
            yield f"{own}.scales", (count // group,), F32


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, f, q, kv = cfg.width, cfg.ffn, cfg.heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    return {
        **dict.fromkeys(NORMS, (d,)),
        **dict.fromkeys(("freq_cos", "freq_sin"), (cfg.context or 0, cfg.head_size // 2)),
        "tok_embeddings": (cfg.vocab, d),
        "wq": (q, d),
        "wk": (kv, d),
        "wv": (kv, d),
        "wo": (d, q),
        "w1": (f, d),
        "w2": (d, f),
        "w3": (f, d),
        "output": (cfg.vocab, d),
    }


def load(file: Path, layout: Layout, dtype: Any, *, packed: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a file: its config, and its parameters in `dtype`, placed by `layout`.

    packed: version 2's int8 codes and scales stay what they are, as packed leaves; by default they become numbers.
    Raises `CheckpointError` where the file is damaged, or has no codes, or where its groups are no groups of a packed leaf.
    """
    model = read_file(file)
    if packed:
        _check_packable(file, model)

    def leaf(path: str, spec: ParamSpec) -> Any:
        source = SOURCES[path]
        if packed and source.name not in NORMS:
            return _packed_leaf(model, source, spec, layout, dtype)
        sharding = layout.sharding(spec.letters, spec.shape)
        values = functools.partial(_values, model, source.name)
        return place_leaf(
            spec.shape,
            dtype,
            sharding,
            functools.partial(source.turn, values, model.cfg.head_size),
            stacked=int(spec.stacked),
            outer=source.outer,
        )

    return model.cfg, map_with_path(leaf, param_specs(model.cfg))


def _values(model: Model, name: str, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    """A part of a tensor as float32. Groups of scales run along the flattened matrix, over the ends of rows."""
    own = ".".join((name, *map(str, layer)))
    stored = model.tensors.read(own, index)
    if model.group is None or name in NORMS:
        return stored
    width = model.tensors[own].shape[1]
    rows, columns = (range(size)[part] for part, size in zip(index, model.tensors[own].shape))
    begin, end = rows.start * width, rows.stop * width
    scales = model.tensors.read(f"{own}.scales", (slice(begin // model.group, -(-end // model.group)),))
    skipped = begin % model.group
    each = np.repeat(scales, model.group)[skipped : skipped + end - begin].reshape(len(rows), width)
    return stored * each[:, columns.start : columns.stop]


def _check_packable(file: Path, model: Model) -> None:
    if model.group is None:
        raise CheckpointError(
            f"{file}: got version {model.version}, whose numbers are float32, expected version 2 for packed weights. Load it unpacked and quantize it."
        )
    for width, what in (
        (model.cfg.width, "dim"),
        (model.cfg.ffn, "hidden_dim"),
        (model.cfg.head_size, "the width of a head"),
    ):
        if width % model.group:
            raise CheckpointError(
                f"{file}: got groups of {model.group} numbers, expected a divisor of {what} = {width}: a packed leaf's groups end with its last contracted "
                "dim. Load it unpacked and quantize it anew."
            )


def _packed_leaf(model: Model, source: "Source", spec: ParamSpec, layout: Layout, dtype: Any) -> QTensor:
    """Codes and scales, turned alike: along the last contracted dim a scale stands for a group of codes."""
    assert model.group is not None
    grouped = spec.axes[-1]
    scale_shape = tuple(n // model.group if i == len(spec.shape) + grouped else n for i, n in enumerate(spec.shape))
    head = model.cfg.head_size
    scale_head = head // model.group if source.turn is _output else head

    def place(
        shape: tuple[int, ...], letters: str, dtype: Any, read: Callable[..., np.ndarray], head: int
    ) -> jax.Array:
        turned = functools.partial(source.turn, read, head)
        sharding = layout.sharding(letters, shape)
        return place_leaf(shape, dtype, sharding, turned, stacked=int(spec.stacked), outer=source.outer)

    scale_letters = "".join(WHOLE if i == len(spec.shape) + grouped else x for i, x in enumerate(spec.letters))
    return QTensor(
        place(spec.shape, spec.letters, I8, functools.partial(_codes, model, source.name), head),
        place(scale_shape, scale_letters, F32, functools.partial(_scales, model, source.name), scale_head),
        None,
        QFormat(bits=8, granularity="group", group=model.group),
        spec.axes,
        jax.numpy.dtype(dtype).name,
    )


def _codes(model: Model, name: str, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    return model.tensors.read(".".join((name, *map(str, layer))), index)


def _scales(model: Model, name: str, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    """A part of a tensor's scales as a matrix [rows, groups of a row]."""
    own = ".".join((name, *map(str, layer)))
    assert model.group is not None
    rows, columns = index
    width = model.tensors[own].shape[1] // model.group
    return model.tensors.read(f"{own}.scales", (slice(rows.start * width, rows.stop * width),)).reshape(-1, width)[
        :, columns
    ]


# ---- How a leaf's part is read of a stored matrix: `read(index, *layer)` gives a part [rows, columns] of what is stored.


def _same(read: Callable[..., np.ndarray], head: int, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    return read(index, *layer)


def _turned(read: Callable[..., np.ndarray], head: int, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    """Stored [out, in], here [in, out]."""
    return read(index[::-1], *layer).T


def _heads(read: Callable[..., np.ndarray], head: int, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    """Stored [H * C, D], here [D, H, C]."""
    d, h, c = index
    rows = read((_of_heads(h, head), d), *layer)
    return rows.reshape(-1, head, rows.shape[1])[:, c].transpose(2, 0, 1)


def _rotary_heads(read: Callable[..., np.ndarray], head: int, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    """The same, with the first channel of every pair before all the second ones."""
    d, h, c = index
    order = [*range(0, head, 2), *range(1, head, 2)]
    return _heads(read, head, (d, h, slice(None)), *layer)[:, :, order[c]]


def _output(read: Callable[..., np.ndarray], head: int, index: tuple[slice, ...], *layer: int) -> np.ndarray:
    """Stored [D, H * C], here [H, C, D]."""
    h, c, d = index
    rows = read((d, _of_heads(h, head)), *layer)
    return rows.reshape(rows.shape[0], -1, head)[:, :, c].transpose(1, 2, 0)


def _of_heads(h: slice, head: int) -> slice:
    return slice(h.start * head, h.stop * head)


class Source(NamedTuple):
    """Where a leaf comes from: the stored name, how its parts are turned, and which of its dims is outermost in the file."""

    name: str
    turn: Callable[..., np.ndarray]
    outer: int


SOURCES: dict[str, Source] = {
    "embed/table": Source("tok_embeddings", _same, 0),
    "blocks/attn_norm/scale": Source("attention_norm", _same, 0),
    "blocks/attn/wq": Source("wq", _rotary_heads, 1),
    "blocks/attn/wk": Source("wk", _rotary_heads, 1),
    "blocks/attn/wv": Source("wv", _heads, 1),
    "blocks/attn/wo": Source("wo", _output, 2),
    "blocks/mlp_norm/scale": Source("ffn_norm", _same, 0),
    "blocks/mlp/gate": Source("w1", _turned, 1),
    "blocks/mlp/down": Source("w2", _turned, 1),
    "blocks/mlp/up": Source("w3", _turned, 1),
    "final_norm/scale": Source("norm", _same, 0),
    "head/w": Source("output", _turned, 1),
}
MATRICES = ("wq", "wk", "wv", "wo")
NORMS = ("attention_norm", "ffn_norm", "norm")
PER_LAYER = ("attention_norm", "ffn_norm", *MATRICES, "w1", "w2", "w3")
# Version 0 has cosines and sines, which run.c skips too: it makes its own, with a theta of 10,000.
ORDER_0 = (
    *("tok_embeddings", "attention_norm", *MATRICES, "ffn_norm", "w1", "w2", "w3", "norm"),
    *("freq_cos", "freq_sin", "output"),
)
ORDER_1 = (*NORMS, "tok_embeddings", *MATRICES, "w1", "w2", "w3", "output")
