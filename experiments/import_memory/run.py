"""Host memory that an import of a checkpoint and its export take: a made-up one of 2 GB, streamed to a temporary folder and deleted after.

PYTHONPATH=. python experiments/import_memory/run.py [--layers 16] [--cases NAME ...] [--json results.jsonl]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmeff.core.tree import flatten
from lmeff.interop.tensors import Tensors, open_tensors, write_tensors
from lmeff.models.config import ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
MIB = 2**20


def model(layers: int) -> ModelConfig:
    """The shape: near Llama-3.2-1B with a smaller vocabulary."""
    return ModelConfig(vocab=32_000, width=2048, layers=layers, heads=32, kv_heads=32, ffn=5632, tied=False)


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor of this leaf as Hugging Face stores it: matrices [out, in]."""
    if path.endswith("wo"):
        return (shape[-1], int(np.prod(shape[:-1])))
    return (int(np.prod(shape[1:])), shape[0]) if len(shape) > 1 and path != "embed/table" else shape


def tensor_shapes(leaves: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by leaf and layer."""
    found = {}
    for path, spec in leaves.items():
        own = stored_shape(path, spec.shape[spec.stacked :])
        found |= {f"{path}.{i}": own for i in range(spec.shape[0])} if spec.stacked else {path: own}
    return found


def make(folder: Path, leaves: dict[str, Any]) -> int:
    """Writes it with random bits of finite numbers; gives its bytes."""
    import jax

    rng = np.random.default_rng(0)
    specs = {name: jax.ShapeDtypeStruct(shape, BF16) for name, shape in tensor_shapes(leaves).items()}
    write_tensors(
        folder,
        specs,
        lambda name: rng.integers(0x3C00, 0x3F00, specs[name].shape, np.uint16).view(BF16),
        shard_bytes=500_000_000,
    )
    return sum(int(np.prod(spec.shape)) * 2 for spec in specs.values())


def reader(tensors: Tensors, path: str, shape: tuple[int, ...]) -> Callable[..., np.ndarray]:
    """A leaf's part out of [out, in]."""

    def read(index: tuple[slice, ...], *layer: int) -> np.ndarray:
        name = ".".join((path, *map(str, layer)))
        if len(shape) < 2 or path == "embed/table":
            return tensors.read(name, index)
        if len(shape) == 2:
            return tensors.read(name, index[::-1]).T
        if path.endswith("wo"):
            h, c, d = index
            head = slice(h.start * shape[1], h.stop * shape[1])
            return tensors.read(name, (d, head)).reshape(d.stop - d.start, -1, shape[1])[:, :, c].transpose(1, 2, 0)
        d, h, c = index
        head = slice(h.start * shape[2], h.stop * shape[2])
        return tensors.read(name, (head, d)).reshape(-1, shape[2], d.stop - d.start)[:, c].transpose(2, 0, 1)

    return read


def placed(tensors: Tensors, path: str, spec: Any, sharding: Any) -> Any:
    """A leaf as lmeff imports it."""
    from lmeff.interop.place import place_leaf

    shape = spec.shape[spec.stacked :]
    outer = {"wo": 2}.get(path[-2:], 1 if len(shape) > 1 and path != "embed/table" else 0)
    read = reader(tensors, path, shape)
    return place_leaf(spec.shape, BF16, sharding, read, stacked=int(spec.stacked), outer=outer)


def stacked(tensors: Tensors, path: str, spec: Any, sharding: Any) -> Any:
    """The plain way to compare with: each layer turned around, `np.stack`, `jax.device_put`."""
    import jax

    shape = spec.shape[spec.stacked :]
    read = reader(tensors, path, shape)
    whole = tuple(slice(0, n) for n in shape)
    if not spec.stacked:
        return jax.device_put(np.ascontiguousarray(read(whole)), sharding)
    layers = [np.ascontiguousarray(read(whole, layer)) for layer in range(spec.shape[0])]
    return jax.device_put(np.stack(layers), sharding)


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since `forget`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def forget() -> None:
    """Sets the high-water mark to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(layers: int, folder: Path, mesh: dict[str, int], how: str) -> dict[str, Any]:
    """In a process of its own: imports leaf by leaf, and notes how far memory rose above what there was at first and the arrays so far."""
    import jax

    from lmeff.interop.place import fetch_tensor
    from lmeff.models.transformer import param_specs
    from lmeff.parallel.mesh import MeshPlan, make_layout

    layout = make_layout(MeshPlan(**mesh))
    leaves = flatten(param_specs(model(layers)))
    tensors = open_tensors(folder)
    jax.block_until_ready(jax.device_put(np.zeros(8), layout.replicated))
    start, arrays, over, found, begin = memory("VmRSS"), 0, {}, {}, time.perf_counter()
    for path, spec in leaves.items():
        forget()
        place = placed if how == "placed" else stacked
        found[path] = jax.block_until_ready(place(tensors, path, spec, layout.sharding(spec.letters, spec.shape)))
        arrays = sum(shard.data.nbytes for x in found.values() for shard in x.addressable_shards)
        over[path] = memory("VmHWM") - start - arrays
    seconds = time.perf_counter() - begin
    largest = max(x.nbytes for x in found.values())
    settled = memory("VmRSS") - start - arrays
    worst = max(over, key=lambda path: over[path])
    row = {"how": how, "mesh": mesh, "arrays": arrays, "largest_leaf": largest, "worst_leaf": worst}
    row |= {"import_over": over[worst], "left_over": settled, "seconds": round(seconds, 1)}
    if how == "placed":
        forget()
        specs = {
            f"{path}.{i}": jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            for path, x in found.items()
            for i in range(x.shape[0])
            if leaves[path].stacked
        }
        with tempfile.TemporaryDirectory(dir=folder.parent) as out:
            write_tensors(
                Path(out) / "m", specs, lambda n: fetch_tensor(found[n.rpartition(".")[0]], int(n.rpartition(".")[2]))
            )
        row["export_over"] = memory("VmHWM") - start - arrays
    return row


CASES: dict[str, tuple[str, int, dict[str, int]]] = {
    "one device": ("placed", 1, {}),
    "fsdp 4 x tensor 2": ("placed", 8, {"fsdp": 4, "tensor": 2}),
    "one device, np.stack": ("stacked", 1, {}),
}


def main() -> None:
    """Makes the checkpoint, measures each case in a process of its own, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="16 are 2 GB")
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--json", type=Path, help="file to append a line of results to for each case")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        how, _, mesh = CASES[args.measure[0]]
        print(json.dumps(measure(args.layers, Path(args.measure[1]), mesh, how)))
        return
    from lmeff.models.transformer import param_specs

    with tempfile.TemporaryDirectory() as home:
        size = make(Path(home) / "m", flatten(param_specs(model(args.layers))))
        print(f"checkpoint: {size / MIB:,.0f} MiB", flush=True)
        print("case | largest leaf, MiB | import, over arrays | of the largest leaf | left after | export | seconds")
        for case in args.cases:
            row = {"case": case, "checkpoint": size, **_child(args.layers, case, Path(home) / "m")}
            mib = {key: round(row[key] / MIB, 1) for key in ("largest_leaf", "import_over", "left_over")}
            share = row["import_over"] / row["largest_leaf"]
            export = f"{row['export_over'] / MIB:.1f}" if "export_over" in row else "-"
            shown = (case, mib["largest_leaf"], mib["import_over"], f"{share:.2f}", mib["left_over"], export)
            print(*shown, row["seconds"], sep=" | ", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def _child(layers: int, case: str, folder: Path) -> dict[str, Any]:
    devices = CASES[case][1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--layers", str(layers), "--measure", case, str(folder)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
