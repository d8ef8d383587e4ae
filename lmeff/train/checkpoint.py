"""Checkpoints: orbax writes, commits and reshards; what it does not notice is checked here.

Orbax loads a flipped bit, casts a wrong dtype silently, and gives one message for every misfit. So each checkpoint carries a manifest (path,
shape, dtype and digest of every leaf), is compared with what is asked for before anything is read, and is verified twice:
its files against their sums (`seal`), its arrays against digests taken from device memory when they were saved (`digest`).

    DIRECTORY/STEP/arrays/      the leaves, by path
    DIRECTORY/STEP/manifest/    the caller's metadata and the leaves' shapes, dtypes and digests, as JSON
    DIRECTORY/STEP/SHA256SUMS   written last. Absent where the process was killed between commit and seal: then the digests alone vouch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lmeff.core.errors import CheckpointError
from lmeff.parallel.processes import leads, sync
from lmeff.train.digest import digests
from lmeff.train.seal import broken, seal

VERSION = 1
SHOWN = 3  # leaves named in a message


class Checkpointer:
    """The checkpoints of one directory, by step; a context manager, so that nothing is left unwritten.

    Opening and reading never create or change a file. On a pod every process makes the same calls on a shared filesystem.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        """`keep`: how many checkpoints stay; older ones are deleted once a newer one is complete."""
        assert keep >= 1, keep
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._orbax: ocp.CheckpointManager | None = None
        self._writing = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
        """Starts to write `tree` and JSON-able `metadata`; returns once the arrays may be donated, and writes on in the background.

        A checkpoint of the same step is replaced. Raises `CheckpointError` where the last write failed or a later step is there.
        """
        leaves = _leaves(tree)
        manifest = _manifest(leaves, metadata)
        self.wait()
        manager = self._manager(writing=True)
        steps = manager.all_steps()
        if steps and max(steps) > step:
            raise CheckpointError(
                f"{self.directory}: holds a checkpoint of step {max(steps)}, but step {step} was to be saved; expected none later. "
                "Resume that run, or choose another place."
            )
        if step in steps:
            manager.delete(step)
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave({path: x for path, x in leaves.items() if x.size}),
            manifest=ocp.args.JsonSave(manifest),
        )
        with self._write_errors(step):
            manager.save(step, args=args, force=True)
        self._pending = (step, self._pool.submit(self._commit, manager, step))

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The latest complete checkpoint in the structure of `abstract` (`jax.ShapeDtypeStruct`s, whose shardings decide where
        arrays go, whatever mesh wrote them), and its metadata.

        Raises `CheckpointError` where there is none, where it does not fit, or where it is damaged. It never falls back to an earlier step.
        """
        step = self._latest()
        problem = broken(self.directory / str(step)) if leads() else None  # reads every byte: once is enough
        if problem is not None:
            raise self._damaged(step, problem)
        sync("seal checked")
        manifest = self._read_manifest(step)
        wanted = _leaves(abstract)
        self._compare(step, manifest["leaves"], wanted)
        leaves = self._read_arrays(step, wanted)
        for path, found in digests(leaves).items():
            if found != manifest["leaves"][path]["digest"]:
                raise self._damaged(step, f"the numbers of {path!r} do not match their digest")
        tree = jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.values()))
        return tree, manifest["metadata"]

    def latest_step(self) -> int | None:
        """The latest complete step, or None. Waits for a write in flight."""
        self.wait()
        return self._manager().latest_step() if self.directory.is_dir() else None

    def metadata(self) -> dict[str, Any]:
        """What `save` was given with the latest complete checkpoint; raises `CheckpointError` like `restore`."""
        return self._read_manifest(self._latest())["metadata"]

    def close(self) -> None:
        """Waits for the last write and raises `CheckpointError` where it failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def __enter__(self) -> "Checkpointer":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes."""
        self.close()

    def _manager(self, *, writing: bool = False) -> ocp.CheckpointManager:
        if self._orbax is None or (writing and not self._writing):
            if self._orbax is not None:
                self._orbax.close()
            policy = ocp.checkpoint_managers.LatestN(self._keep) if writing else None
            options = ocp.CheckpointManagerOptions(
                create=writing,
                cleanup_tmp_directories=writing,
                preservation_policy=policy,
                lightweight_initialize=True,
            )
            self._orbax, self._writing = ocp.CheckpointManager(self.directory, options=options), writing
        return self._orbax

    def _commit(self, manager: ocp.CheckpointManager, step: int) -> None:
        manager.wait_until_finished()
        if leads():
            seal(self.directory / str(step))

    def wait(self) -> None:
        """Returns once the last write is complete; raises `CheckpointError` where it failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        with self._write_errors(step):
            future.result()

    @contextlib.contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory}: step {step} could not be saved ({_first_line(error)}). "
                "Earlier checkpoints are untouched; see that the disk has space and may be written, then resume."
            ) from error

    def _latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self.directory}: expected a checkpoint, found no complete one. Run the stage that writes it."
            )
        return step

    def _read_manifest(self, step: int) -> dict[str, Any]:
        try:
            stored = self._manager().restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))
            manifest = stored["manifest"]
            checksum = manifest.pop("sha256")
        except Exception as error:  # orbax raises many kinds for one cause
            raise self._damaged(step, f"its manifest cannot be read ({_first_line(error)})") from error
        if checksum != _checksum(manifest):
            raise self._damaged(step, "its manifest does not match its sum")
        if manifest["version"] > VERSION:
            raise CheckpointError(
                f"{self.directory}: step {step} has format {manifest['version']}, this lmeff reads up to {VERSION}. Update lmeff."
            )
        return manifest

    def _compare(self, step: int, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that does not fit, by what differs, before anything is read."""
        shapes = {path: (stored[path]["shape"], list(wanted[path].shape)) for path in wanted if path in stored}
        dtypes = {path: (stored[path]["dtype"], wanted[path].dtype.name) for path in wanted if path in stored}
        problems = {
            "lacks leaves that this config has": [p for p in wanted if p not in stored],
            "has leaves that this config has not": [p for p in stored if p not in wanted],
            "has other shapes": [f"{p} {got}, expected {want}" for p, (got, want) in shapes.items() if got != want],
            "has other dtypes": [f"{p} {got}, expected {want}" for p, (got, want) in dtypes.items() if got != want],
        }
        for what, named in problems.items():
            if named:
                more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
                raise CheckpointError(
                    f"{self.directory}: step {step} does not fit: it {what}: {'; '.join(named[:SHOWN])}{more}. "
                    "Go on with the config that wrote it, or choose another place for this one."
                )

    def _read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = {path: here if x.sharding is None else x.sharding for path, x in wanted.items()}
        full = {path: x for path, x in wanted.items() if x.size}
        restore = {
            path: ocp.ArrayRestoreArgs(sharding=places[path], global_shape=x.shape, dtype=x.dtype)
            for path, x in full.items()
        }
        args = ocp.args.PyTreeRestore(item=full, restore_args=restore)
        try:
            stored = self._manager().restore(step, args=ocp.args.Composite(arrays=args))["arrays"]
        except Exception as error:  # orbax raises many kinds for one cause
            raise self._damaged(step, f"its arrays cannot be read ({_first_line(error)})") from error
        empty = {
            path: jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=places[path])(x.shape, x.dtype)
            for path, x in wanted.items()
            if not x.size
        }
        return {path: (stored | empty)[path] for path in wanted}

    def _damaged(self, step: int, why: str) -> CheckpointError:
        earlier = [s for s in self._manager().all_steps() if s < step]
        remedy = (
            f"to go on from step {max(earlier)} instead" if earlier else "and start afresh: there is no earlier one"
        )
        return CheckpointError(
            f"{self.directory}: step {step} is damaged: {why}. Delete {self.directory / str(step)} {remedy}."
        )


def _leaves(tree: Any) -> dict[str, Any]:
    """`{path: leaf}` in tree order; paths join dict keys, field names and positions by `/`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
    assert len(leaves) == len(flat), "two leaves share a path"
    return {path: x if hasattr(x, "sharding") else jnp.asarray(x) for path, x in leaves.items()}


def _manifest(leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = digests(dict(leaves))
    table = {path: {"shape": list(x.shape), "dtype": x.dtype.name, "digest": found[path]} for path, x in leaves.items()}
    manifest = json.loads(json.dumps({"version": VERSION, "metadata": dict(metadata), "leaves": table}))
    return manifest | {"sha256": _checksum(manifest)}


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds a run folder for this process; raises `CheckpointError` where another one does.

    The operating system drops the lock when its holder ends, however it ends. On a pod, process 0 holds it for all.
    """
    if not leads():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CheckpointError(
                f"{directory}: in use by {holder}; expected a run folder that nobody writes to. Wait for it, end it, or choose another --name."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
