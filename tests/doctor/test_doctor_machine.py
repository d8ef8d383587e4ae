"""What the doctor says of a machine: environment, memory, disks, the run folder, accelerators. Bad cases are made up, or really there."""

import dataclasses
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lmeff.config import Experiment, Quantize, Stage, TrainConfig, preset
from lmeff.config.validate import validate
from lmeff.core.accelerators import hardware
from lmeff.core.errors import UsageError
from lmeff.doctor import accelerators, devices, environment, folder, space
from lmeff.doctor.packages import Package

GIB = 2**30


@pytest.mark.parametrize(
    ("variables", "level", "words"),
    [
        ({}, "ok", "nothing set"),
        ({"JAX_PLATFORMS": "tpu"}, "ok", "JAX_PLATFORMS=tpu"),
        ({"XLA_FLAGS": "--xla_dump_to=/tmp/x"}, "ok", "XLA_FLAGS"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, "look", "8 devices of this CPU"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=eight"}, "FAIL", "'eight'"),
        ({"JAX_DISABLE_JIT": "1"}, "FAIL", "JAX_DISABLE_JIT"),
        ({"JAX_DISABLE_JIT": "0"}, "ok", "JAX_DISABLE_JIT=0"),
        ({"JAX_ENABLE_X64": "True"}, "look", "JAX_ENABLE_X64"),
        ({"JAX_DEBUG_NANS": "1"}, "look", "JAX_DEBUG_NANS"),
        ({"JAX_COMPILATION_CACHE_DIR": "/proc/nowhere"}, "look", "/proc/nowhere"),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache"}, "ok", "gs://bucket/cache"),
        ({"TPU_LOAD_LIBRARY": "0"}, "FAIL", "TPU_LOAD_LIBRARY"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "FAIL", "all devices"),
        ({"TPU_VISIBLE_CHIPS": "0,1"}, "look", "some devices"),
        ({"ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}, "look", "two processes"),
    ],
    ids=lambda value: "+".join(value) or "none" if isinstance(value, dict) else None,
)
def test_variables_that_bite(variables, level, words, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))  # root may write anywhere
    check = environment.environment(variables)
    assert (check.level, words in check.found) == (level, True), check
    assert bool(check.remedy) is not check.ok


def test_the_gravest_of_several_problems_comes_first():
    check = environment.environment({"JAX_DEBUG_NANS": "1", "JAX_DISABLE_JIT": "1"})
    assert check.level == "FAIL"
    assert check.found.startswith("JAX_DISABLE_JIT runs")
    assert check.remedy == "unset JAX_DISABLE_JIT; unset JAX_DEBUG_NANS"


@pytest.mark.parametrize(
    ("files", "maps", "level", "remedy"),
    [
        ((65536, 65536), "262144", "ok", ""),
        ((256, 4096), "65530", "look", "ulimit -n 4096"),
        ((256, 256), "65530", "look", "limits.conf"),
        ((256, -1), "65530", "look", "ulimit -n"),
        ((-1, -1), "65530", "ok", ""),
        ((4096, 4096), "1000", "look", "sysctl vm.max_map_count"),
    ],
)
def test_limits_of_the_operating_system(tmp_path, files, maps, level, remedy):
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/max_map_count").write_text(f"{maps}\n")
    check = environment.limits(files, tmp_path)
    assert check.level == level
    assert remedy in check.remedy


def test_shared_memory_matters_to_several_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=2**14, f_frsize=4096))
    assert environment.limits((4096, 4096), tmp_path).ok
    check = environment.limits((4096, 4096), tmp_path, ["NVIDIA"])
    assert (check.level, "64.0 MiB" in check.found) == ("look", True)


def test_a_tpu_wants_huge_pages(tmp_path):
    pages = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    pages.parent.mkdir(parents=True)
    pages.write_text("always [madvise] never\n")
    assert environment.limits((4096, 4096), tmp_path).ok
    check = environment.limits((4096, 4096), tmp_path, ["TPU"])
    assert (check.level, f"echo always > {pages}" in check.remedy) == ("look", True)
    pages.write_text("[always] madvise never\n")
    assert environment.limits((4096, 4096), tmp_path, ["TPU"]).ok


def write_memory(root, *, cgroup, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\nSwapTotal: 0 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, limit in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{limit}\n")


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {}, None),
        (
            "0::/job/task\n",
            {"sys/fs/cgroup/job/memory.max": 2 * GIB, "sys/fs/cgroup/job/task/memory.max": "max"},
            2 * GIB,
        ),
        ("0::/a/b\n", {"sys/fs/cgroup/memory.max": 5 * GIB}, 5 * GIB),  # a container sees its own as the root
        ("4:memory:/x\n1:cpu:/x\n", {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": GIB}, GIB),
        ("4:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712}, None),
    ],
    ids=["none", "v2_above", "v2_container", "v1", "v1_unlimited"],
)
def test_limits_of_a_cgroup_count(tmp_path, cgroup, files, limit):
    write_memory(tmp_path, cgroup=cgroup, files=files)
    found = space.read_memory(tmp_path)
    assert found == space.Memory(64 * GIB, 32 * GIB, 0, limit)


@pytest.mark.parametrize(
    ("found", "state", "level", "words"),
    [
        (space.Memory(64 * GIB, 60 * GIB, 0, None), 0, "ok", "64.0 GiB, 60.0 GiB free, no swap"),
        (space.Memory(64 * GIB, 60 * GIB, GIB, 2 * GIB), 0, "look", "the cgroup's limit; the host has 64.0 GiB"),
        (space.Memory(64 * GIB, GIB, 0, None), 0, "look", "only 1.0 GiB are free"),
        (
            space.Memory(64 * GIB, 60 * GIB, 0, None),
            90 * GIB,
            "FAIL",
            "the state of training takes 90.0 GiB of this memory",
        ),
        (space.Memory(64 * GIB, 60 * GIB, 0, 8 * GIB), 9 * GIB, "FAIL", "9.0 GiB"),
    ],
)
def test_memory(found, state, level, words):
    check = space.memory(found, state)
    assert (check.level, words in check.found) == (level, True), check


def test_bytes_of_a_run_are_counted_by_hand():
    """AdamW in float32 keeps two moments a parameter and one count; with keep = 2, three checkpoints are there while the third is written."""
    model = preset("tiny")
    v, d, f = model.vocab, model.width, model.ffn
    params = v * d + d + model.layers * (2 * d * d + 2 * d * d // 2 + 3 * d * f + 2 * d)
    experiment = Experiment(
        name="x",
        model=model,
        train=TrainConfig(keep=2, steps=10),
        recipe=(Stage(name="a"), Stage(name="b", start="a", steps=0)),
    )
    found = space.sizes(experiment, {"a": model, "b": model})
    assert abs(found.state - 12 * params) <= 64  # counters
    assert found.kept == 3 * found.state + 2 * 4 * params
    assert found.offloaded == 0
    offloaded = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, offload=True))
    assert abs(space.sizes(offloaded, {"a": model, "b": model}).offloaded - 8 * params) <= 64


def test_a_stage_that_goes_on_keeps_its_starts_state():
    quantize = Quantize(method="lsq", rules=((r"blocks/.*w[qkvo]", "int4"), (".*", None)))
    recipe = (Stage(name="a", compress=(quantize,), steps=1), Stage(name="b", start="a", steps=1))
    experiment = Experiment(name="x", model=preset("small"), recipe=recipe)
    shapes = validate(experiment, 1)
    first = space.sizes(Experiment(name="x", model=preset("small"), recipe=recipe[:1]), shapes)
    assert space.sizes(experiment, shapes) == space.Sizes(first.state, 2 * first.kept)


@pytest.mark.parametrize(
    ("place", "needed", "there", "level", "words"),
    [
        ({}, None, 0, "ok", "runs 50.0 GiB free"),
        ({}, 40 * GIB, 0, "ok", "the run takes 40.0 GiB"),
        ({}, 60 * GIB, 0, "FAIL", "checkpoints and artifacts take 60.0 GiB, /disk has 50.0 GiB"),
        ({}, 60 * GIB, 20 * GIB, "ok", "the run takes"),
        ({"free": GIB}, None, 0, "look", "only 1.0 GiB"),
        ({"inodes": 12}, None, 0, "look", "room for 12 more files"),
        ({"inodes": None}, None, 0, "ok", "free"),
        ({"kind": "tmpfs"}, None, 0, "look", "gone after a restart"),
    ],
)
def test_disks(tmp_path, place, needed, there, level, words):
    values = {"path": "/disk", "free": 50 * GIB, "inodes": 10**6, "kind": "ext4"} | place
    check = space.disk({"runs": space.Place(**values)}, needed, there)
    assert (check.level, words in check.found) == (level, True), check
    assert bool(check.remedy) is not check.ok


def test_the_mount_of_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/mounts").write_text(f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path.resolve()} tmpfs rw 0 0\n")
    place = space.read_place(tmp_path / "not/there/yet", tmp_path)
    assert place.kind == "tmpfs"
    assert place.free == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)
    assert space.read_place(tmp_path.parent, tmp_path).kind == "ext4"


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    directory = tmp_path / "runs" / "one"
    with folder.standing(directory):
        check = folder.writable(directory)
        assert list(directory.iterdir()) == []
    assert check.ok, check
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_a_run_began_meanwhile_stays(tmp_path):
    with folder.standing(tmp_path / "runs" / "one"):
        (tmp_path / "runs/one/config.json").write_text("{}")
    assert (tmp_path / "runs/one/config.json").exists()


def test_a_run_folder_below_a_file_fails(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with folder.standing(tmp_path / "runs/one"):
        check = folder.writable(tmp_path / "runs/one")
    assert check.level == "FAIL"
    assert "cannot create a file" in check.found
    assert f"{tmp_path / 'runs'} is a file" in check.remedy


def test_a_run_folder_that_cannot_be_made_fails():
    with folder.standing(folder.Path("/proc/lmeff/one")):
        check = folder.writable(folder.Path("/proc/lmeff/one"))
    assert (check.level, "cannot create a file" in check.found) == ("FAIL", True)


def test_a_full_disk_fails_and_leaves_nothing(tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        check = folder.writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert check.level == "FAIL"
    assert "File too large" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused", [True, False], ids=["no_locks", "locks_that_do_not_hold"])
def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, refused):
    def flock(file, operation):
        if refused:
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    check = folder.writable(tmp_path)
    assert (check.level, "locks do not hold" in check.found) == ("look", True)
    assert list(tmp_path.iterdir()) == []


def test_a_url_is_no_run_folder():
    check = folder.writable(folder.Path("gs://bucket/runs/one"))
    assert check.level == "FAIL"
    assert "nothing of it was checked" in check.found
    assert "gcsfuse" in check.remedy


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (f"process {os.getpid()} on {socket.gethostname()}", "which runs", f"kill {os.getpid()}"),
        (f"process 999999999 on {socket.gethostname()}", "which has ended", "lsof"),
        ("process 7 on another-host", "in use by process 7 on another-host", "--name"),
        ("", "another process", "--name"),
    ],
    ids=["alive", "dead", "elsewhere", "unknown"],
)
def test_a_run_that_is_held(tmp_path, words, found, remedy):
    directory = tmp_path / "one"
    directory.mkdir()
    with (directory / ".lock").open("w") as file:
        file.write(words)
        file.flush()
        assert folder.lock(directory, tmp_path).ok  # a file that nobody holds is no lock
        fcntl.flock(file, fcntl.LOCK_EX)
        check = folder.lock(directory, tmp_path)
        assert (check.level, found in check.found, remedy in check.remedy) == ("FAIL", True, True), check
        every = folder.lock(tmp_path, tmp_path)
        assert (every.level, "one by" in every.found) == ("ok", True)
    assert folder.lock(directory, tmp_path).ok


@pytest.mark.parametrize(
    ("skew", "jump", "installed", "level", "words"),
    [
        (0.0, 0.0, 0.0, "ok", "2001-09-09"),
        (None, 0.0, 0.0, "ok", "2001-09-09"),
        (-30.0, 0.0, 0.0, "look", "disk is -30.0 s off"),
        (0.0, 3600.0, 0.0, "look", "jumped by +3600.0 s"),
        (0.0, 0.0, 1.2e9, "FAIL", "before 2008-01-10"),
    ],
    ids=["well", "unknown", "skewed", "jumped", "past"],
)
def test_clocks(skew, jump, installed, level, words):
    check = folder.clock(skew, jump, 1e9, installed)
    assert (check.level, words in check.found) == (level, True), check


def test_the_disks_clock_is_read_off_a_file(tmp_path, monkeypatch):
    assert abs(folder.disk_time(tmp_path)) < 2
    assert list(tmp_path.iterdir()) == []
    real = time.time
    monkeypatch.setattr(folder.time, "time", lambda: real() - 100)
    assert folder.disk_time(tmp_path) == pytest.approx(100, abs=2)


def machine(root, *, names=(), pci=(), processes=()):
    """A root with these device files, PCI devices (vendor, device), and processes (pid, command, file that is open)."""
    for name in names:
        (root / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "dev" / name).touch()
    for position, (vendor, device) in enumerate(pci):
        slot = root / "sys/bus/pci/devices" / str(position)
        slot.mkdir(parents=True)
        (slot / "vendor").write_text(f"{vendor}\n")
        (slot / "device").write_text(f"{device}\n")
    for pid, command, target in processes:
        (root / "proc" / str(pid) / "fd").mkdir(parents=True)
        (root / "proc" / str(pid) / "fd/3").symlink_to(target)
        (root / "proc" / str(pid) / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    return root


@pytest.mark.parametrize(
    ("names", "pci", "found"),
    [
        ((), (), {}),
        (("accel0", "accel1", "accel2", "accel3"), (), {"TPU": 4}),
        (("vfio/0", "vfio/vfio"), [("0x1ae0", "0x0063"), ("0x1ae0", "0x0042")], {"TPU": 1}),
        (("vfio/0",), [("0x8086", "0x0063")], {}),
        (("nvidia0", "nvidia1", "nvidiactl"), (), {"NVIDIA": 2}),
        (("kfd",), (), {"AMD": 1}),
    ],
    ids=["none", "accel", "v5e", "other_vfio", "nvidia", "amd"],
)
def test_accelerators_as_the_operating_system_shows_them(tmp_path, names, pci, found):
    assert hardware(machine(tmp_path, names=names, pci=pci)) == found


@pytest.mark.parametrize(
    ("target", "there", "level"),
    [("/dev/accel0", "TPU", "FAIL"), ("/dev/vfio/0", "TPU", "FAIL"), ("/dev/nvidia0", "NVIDIA", "look")],
)
def test_who_has_the_accelerators(tmp_path, target, there, level):
    root = machine(tmp_path, processes=[(41, "python train.py", target), (42, "cat", "/etc/hosts"), (43, "me", target)])
    check = accelerators.in_use({there: 1}, accelerators.holders(root, own=43))
    assert (check.level, check.remedy) == (level, "wait for it; if it is yours: kill 41")
    assert "process 41 (python train.py)" in check.found
    assert "42" not in check.found


@pytest.fixture
def tpu_lockfile(tmp_path):
    (tmp_path / "tmp").mkdir()
    file = tmp_path / accelerators.LOCKFILE
    file.touch()
    return file


def test_a_tpu_lock_that_a_process_holds(tmp_path, tpu_lockfile):
    script = (
        "import os, sys; f = open(sys.argv[1], 'r+'); os.lockf(f.fileno(), os.F_TLOCK, 0); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", script, tpu_lockfile], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        check = accelerators.tpu_lock({"TPU": 4}, {}, tmp_path)
        assert (check.level, check.remedy) == ("FAIL", f"wait for it; if it is yours: kill {holder.pid}")
        assert accelerators.tpu_lock({}, {}, tmp_path).ok
        assert accelerators.tpu_lock({"TPU": 4}, {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}, tmp_path).ok
        holder.communicate(b"\n")
    stale = accelerators.tpu_lock({"TPU": 4}, {}, tmp_path)
    assert (stale.level, stale.remedy) == ("look", f"sudo rm -f {tpu_lockfile}")
    assert accelerators.tpu_lock({}, {}, tmp_path).ok  # no TPU here
    tpu_lockfile.unlink()
    assert accelerators.tpu_lock({"TPU": 4}, {}, tmp_path).ok


def test_a_stale_tpu_lock_of_another_user_fails(tmp_path, tpu_lockfile, monkeypatch):
    monkeypatch.setattr(accelerators.os, "access", lambda path, mode: False)  # root may open anything
    check = accelerators.tpu_lock({"TPU": 4}, {}, tmp_path)
    assert (check.level, check.remedy) == ("FAIL", f"sudo rm -f {tpu_lockfile}")
    assert "libtpu cannot open it" in check.found


def test_the_holder_of_another_users_lock_is_read_off_the_kernels_list(tmp_path, tpu_lockfile):
    status = tpu_lockfile.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    (tmp_path / "proc").mkdir()
    rows = [
        f"1: FLOCK  ADVISORY  WRITE 11 {device}:{status.st_ino + 1} 0 EOF",
        f"2: -> POSIX  ADVISORY  WRITE 12 {device}:{status.st_ino} 0 EOF",
        f"3: POSIX  ADVISORY  WRITE 13 {device}:{status.st_ino} 0 EOF",
    ]
    (tmp_path / "proc/locks").write_text("\n".join(rows) + "\n")
    assert accelerators._listed(status, tmp_path) == 13
    (tmp_path / "proc/locks").write_text("\n".join(rows[:2]) + "\n")
    assert accelerators._listed(status, tmp_path) is None


class Device:
    """What the doctor asks of a device."""

    def __init__(self, platform="cpu", kind="cpu", id=0, stats=None):
        self.platform, self.device_kind, self.id, self._stats = platform, kind, id, stats

    def memory_stats(self):
        return self._stats


CPU_ALONE = {"jax": Package("0.10.2"), "jaxlib": Package("0.10.2")}
WITH_TPU = CPU_ALONE | {"libtpu": Package("0.0.42.1")}


@pytest.mark.parametrize(
    ("there", "variables", "installed", "chosen", "level", "remedy"),
    [
        ({}, {}, CPU_ALONE, False, "ok", ""),
        ({"TPU": 4}, {}, CPU_ALONE, False, "FAIL", "pip install 'jax[tpu]==0.10.2'"),
        ({"TPU": 4}, {"JAX_PLATFORMS": "cpu"}, WITH_TPU, False, "FAIL", "unset JAX_PLATFORMS, which is 'cpu'"),
        ({"TPU": 4}, {}, WITH_TPU, False, "FAIL", "JAX_PLATFORMS=tpu python"),
        ({"TPU": 4}, {}, WITH_TPU, True, "ok", ""),
        ({"NVIDIA": 8}, {}, WITH_TPU, False, "FAIL", "pip install 'jax[cuda]==0.10.2'"),
        ({"NVIDIA": 8}, {"JAX_PLATFORMS": "cuda,cpu"}, CPU_ALONE, False, "FAIL", "pip install 'jax[cuda]==0.10.2'"),
    ],
    ids=["none", "cpu_only_jax", "cpu_chosen", "tpu_refuses", "simulated", "cpu_only_gpu", "cuda_named"],
)
def test_an_accelerator_that_is_there_and_not_used(there, variables, installed, chosen, level, remedy):
    check = devices.devices([Device()] * 2, there, variables, installed, chosen=chosen)
    assert check.level == level
    assert remedy in check.remedy
    assert "2 x cpu" in check.found


def test_an_accelerator_that_is_used():
    check = devices.devices([Device("tpu", "TPU v5 lite")] * 4, {"TPU": 4}, {}, WITH_TPU, chosen=False)
    assert (check.level, check.found) == ("ok", "4 x TPU v5 lite (tpu)")


@pytest.mark.parametrize(
    ("error", "variables", "remedy"),
    [
        (
            RuntimeError("Unable to initialize backend 'tpux'"),
            {"JAX_PLATFORMS": "tpux"},
            "unset JAX_PLATFORMS, which is 'tpux'",
        ),
        (RuntimeError("ABORTED: The TPU is already in use by process with pid 7"), {}, "`TPU lock` names"),
        (UsageError("this host is one of 4 of a pod"), {}, "--distributed"),
        (RuntimeError("FAILED_PRECONDITION: no"), {}, "jax.devices()"),
    ],
    ids=["unknown_platform", "in_use", "alone_on_a_pod", "other"],
)
def test_no_devices_at_all(error, variables, remedy):
    check = devices.refused(error, variables)
    assert (check.level, check.found, remedy in check.remedy) == ("FAIL", str(error), True), check


@pytest.mark.parametrize(
    ("stats", "level", "words"),
    [
        ([None], "ok", "not told"),
        ([(16, 0), (16, 0)], "ok", "16.0 GiB each"),
        ([(16, 0), (16, 3)], "look", "3.0 GiB of device 1 in use already"),
        ([(16, 0), (8, 0)], "look", "devices differ"),
    ],
)
def test_memory_of_devices(stats, level, words):
    local = [
        Device(id=n, stats=s and {"bytes_limit": s[0] * GIB, "bytes_in_use": s[1] * GIB}) for n, s in enumerate(stats)
    ]
    check = devices.device_memory(local)
    assert (check.level, words in check.found) == (level, True), check
