"""Host memory that an import of a checkpoint and its export take: a made-up one of 2 GB, streamed to a temporary folder and deleted after.

PYTHONPATH=. python experiments/import_memory/run.py [--layers 16] [--cases NAME ...] [--json results.jsonl]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.tree import unflatten
from lmeff.interop import hf
from lmeff.interop.config_json import choose, text_of
from lmeff.interop.stored import named, pieces, read_part, stored_shape
from lmeff.interop.tensors import Tensors, TensorWriter, open_tensors
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import MeshPlan, make_layout

BF16 = np.dtype(jnp.bfloat16)
MIB = 2**20
SHARD_BYTES = 500_000_000


def model(layers: int) -> ModelConfig:
    """The shape: near Llama-3.2-1B with a smaller vocabulary."""
    return ModelConfig(vocab=32_000, width=2048, layers=layers, heads=32, kv_heads=32, ffn=5632, tied=False)


def make(cfg: ModelConfig, folder: Path) -> int:
    """Writes a Hugging Face folder of this shape with random bits of finite numbers; gives the bytes of its tensors."""
    rng = np.random.default_rng(0)
    family = choose(cfg, "llama", folder)
    leaves = hf.located(family, cfg, family.prefixes[0])
    found = pieces({path: (spec.letters, stored) for path, (spec, stored) in leaves.items()}, hf.sizes_of(cfg))
    shapes = {name: stored_shape(parts[0].stored, hf.sizes_of(cfg)) for name, parts in found.items()}
    specs = {name: jax.ShapeDtypeStruct(shape, BF16) for name, shape in shapes.items()}
    with TensorWriter(folder, specs, shard_bytes=SHARD_BYTES) as writer:
        for name, shape in shapes.items():
            writer.write(name, rng.integers(0x3C00, 0x3F00, shape, np.uint16).view(BF16))
        (writer.folder / "config.json").write_text(text_of(family, cfg, "bfloat16", {}, folder))
    return sum(math.prod(shape) * BF16.itemsize for shape in shapes.values())


def stacked(tensors: Tensors, spec: Any, stored: Any, cfg: ModelConfig, layout: Any) -> Any:
    """The plain way to compare with: each layer turned around, `np.stack`, `jax.device_put`."""
    sizes, count = hf.sizes_of(cfg), len(stored.stacks(spec.letters))
    whole = tuple(slice(0, n) for n in spec.shape[count:])
    layers = [
        np.ascontiguousarray(read_part(tensors, stored, spec.letters, sizes, named(stored, spec.letters, at), whole))
        for at in np.ndindex(*spec.shape[:count])
    ]
    return jax.device_put(np.stack(layers).reshape(spec.shape), layout.sharding(spec.letters, spec.shape))


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since `forget`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def forget() -> None:
    """Sets the high-water mark to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: Path, mesh: dict[str, Any], how: str) -> dict[str, Any]:
    """In a process of its own: imports leaf by leaf, and notes how far memory rose above what there was at first and the arrays so far."""
    layout, cfg, tensors = make_layout(MeshPlan(**mesh)), hf.read_config(folder), open_tensors(folder)
    family = choose(cfg, "llama", folder)
    jax.block_until_ready(jax.device_put(np.zeros(8), layout.replicated))
    start, arrays, over, found, begin = memory("VmRSS"), 0, {}, {}, time.perf_counter()
    for path, (spec, stored) in hf.located(family, cfg, family.prefixes[0]).items():
        forget()
        if how == "placed":
            found[path] = hf.read_leaf(tensors, spec, stored, cfg, layout, None)
        else:
            found[path] = stacked(tensors, spec, stored, cfg, layout)
        jax.block_until_ready(found[path])
        arrays = sum(shard.data.nbytes for x in found.values() for shard in x.addressable_shards)
        over[path] = memory("VmHWM") - start - arrays
    seconds = time.perf_counter() - begin
    worst = max(over, key=lambda path: over[path])
    row = {"how": how, "mesh": mesh, "arrays": arrays, "largest_leaf": max(x.nbytes for x in found.values())}
    row |= {"worst_leaf": worst, "import_over": over[worst], "left_over": memory("VmRSS") - start - arrays}
    if how == "placed":
        forget()
        with tempfile.TemporaryDirectory(dir=folder.parent) as out:
            hf.export(cfg, unflatten(found), Path(out) / "m", family="llama", shard_bytes=SHARD_BYTES)
            row["export_over"] = memory("VmHWM") - start - arrays
            row["same_bytes_again"] = _same(tensors, open_tensors(Path(out) / "m"))
    return row | {"seconds": round(seconds, 1)}


def _same(a: Tensors, b: Tensors) -> bool:
    return set(a) == set(b) and all(a.read(name).tobytes() == b.read(name).tobytes() for name in a)


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
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
        print(json.dumps(measure(Path(args.measure[1]), mesh, how)))
        return
    with tempfile.TemporaryDirectory() as home:
        size = make(model(args.layers), Path(home) / "m")
        print(f"checkpoint: {size / MIB:,.0f} MiB", flush=True)
        print("case | largest leaf, MiB | import, over arrays | of the largest leaf | left after | export | seconds")
        for case in args.cases:
            row = {"case": case, "checkpoint": size, **_child(case, Path(home) / "m")}
            mib = {key: round(row[key] / MIB, 1) for key in ("largest_leaf", "import_over", "left_over")}
            share = row["import_over"] / row["largest_leaf"]
            export = f"{row['export_over'] / MIB:.1f}" if "export_over" in row else "-"
            shown = (case, mib["largest_leaf"], mib["import_over"], f"{share:.2f}", mib["left_over"], export)
            print(*shown, row["seconds"], sep=" | ", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def _child(case: str, folder: Path) -> dict[str, Any]:
    devices = CASES[case][1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--measure", case, str(folder)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
