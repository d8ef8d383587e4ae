"""What chips can do: rates, memory, links and power as their makers give them, each row with its sources.

All rates are dense. NVIDIA's sheets print twice as much for 2:4 sparsity, which is often quoted without that word. Bytes are decimal except where a source
counts in GiB.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmeff.core.errors import ConfigError

FORMATS = ("float32", "bfloat16", "int8", "fp8")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip as its maker describes it. Numbers are a chip's; a chip may be several devices (`cores`).

    platform:  "cpu", "gpu" or "tpu". source: where the numbers are from.
    flops:     FLOP/s of products by format of the arithmetic (`FORMATS`); a format that is missing runs at the rate of bfloat16.
    hbm:       bytes of its memory. usable: those that programs may fill, on each of its devices.
    bandwidth: bytes/s of its memory. cores: devices that JAX sees in a chip. die: bytes/s each way between them.
    ici:       bytes/s that a chip sends along one torus axis, both directions together. dims: axes of the torus. pod: chips of the largest slice.
    wraps:     a side is a ring where it is a multiple of this, else a line. longest: the longest side.
    nvlink:    bytes/s that a chip sends to its `domain`, the chips of a switch. ib: bytes/s that it sends to others.
    dcn:       bytes/s of a host to other slices. host: chips of a host. pcie: bytes/s each way between a chip and its host.
    power:     watts at most.
    """

    name: str
    platform: str
    source: str
    flops: Mapping[str, float] = field(hash=False)
    hbm: float
    usable: int
    bandwidth: float
    cores: int = 1
    die: float = 0.0
    ici: float = 0.0
    dims: int = 0
    pod: int = 0
    wraps: int = 0
    longest: int = 0
    nvlink: float = 0.0
    domain: int = 1
    ib: float = 0.0
    dcn: float = 0.0
    host: int = 1
    pcie: float = 0.0
    power: float = 0.0

    def rate(self, kind: str) -> float:
        """FLOP/s of products in a format; raises `ConfigError` for what is no format."""
        if kind not in FORMATS:
            raise ConfigError(f"format of arithmetic: got '{kind}', expected one of {', '.join(FORMATS)}")
        return self.flops.get(kind, self.flops["bfloat16"])

    def chips(self, devices: int) -> float:
        """How many chips so many devices are. Simulated devices of a CPU share one."""
        return 1 if self.platform == "cpu" else devices / self.cores

    def room(self, devices: int) -> int:
        """Bytes that programs may fill on each of so many devices. Simulated devices of a CPU share its memory."""
        return self.usable // devices if self.platform == "cpu" else self.usable

    def closes(self, side: int) -> bool:
        """Whether a side of a slice is a ring."""
        return self.wraps > 0 and side % self.wraps == 0


# `usable` of TPUs is what libtpu (jax 0.10.2) names when a program does not fit: "available HBM (15.75G)"; tests/plan/test_hardware.py asks it again. Of GPUs:
# what JAX fills with XLA_PYTHON_CLIENT_MEM_FRACTION=.95; left alone, it takes 75%.
# JAX multiplies float32 on TPUs in one pass of bfloat16, and on GPUs in TF32, unless `jax_default_matmul_precision` says otherwise: these are the rates of
# "float32". ICI: the Scaling Book's 45 (v4, v5e) and 90 GB/s a link and direction, a tenth below the nominal 50 and 100 of Google's pages.
# `power` is the vendor's figure where the comment says so or the chip is a GPU, and otherwise an estimate.
CHIPS: dict[str, Chip] = {
    # Verified on the page: 275 TFLOP/s in bf16 or int8, 32 GiB, 1200 GB/s, measured power 90 / 170 / 192 W (idle, mean, max), torus for multiples of 4.
    "v4": Chip(
        name="v4",
        platform="tpu",
        source="https://cloud.google.com/tpu/docs/v4; links: https://jax-ml.github.io/scaling-book/tpus",
        flops={"float32": 275e12, "bfloat16": 275e12, "int8": 275e12},
        hbm=32 * GIB,
        usable=int(30.75 * GIB),
        bandwidth=1.2e12,
        ici=90e9,
        dims=3,
        pod=4096,
        wraps=4,
        longest=16,
        dcn=25e9,
        host=4,
        pcie=16e9,
        power=192,
    ),
    # Verified: 197 TFLOP/s bf16, 393 int8, 16 GB, 819 GB/s, 400 GB/s ICI a chip (4 ports, both directions), 256 chips, 2 x 100 Gb/s NICs for 8 chips.
    "v5e": Chip(
        name="v5e",
        platform="tpu",
        source="https://cloud.google.com/tpu/docs/v5e; links: https://jax-ml.github.io/scaling-book/tpus",
        flops={"float32": 197e12, "bfloat16": 197e12, "int8": 393e12},
        hbm=16 * GIB,
        usable=int(15.75 * GIB),
        bandwidth=819e9,
        ici=90e9,
        dims=2,
        pod=256,
        wraps=16,
        longest=16,
        dcn=25e9,
        host=8,
        pcie=15e9,
        power=145,  # from v6e's and Google's "67% more efficient than v5e"
    ),
    # Verified: 459 TFLOP/s bf16 and fp8, 95 GiB, 2765 GB/s, 1200 GB/s ICI a chip (6 ports), DCN 50 Gb/s a chip, slices up to 16x16x24. int8 is the book's.
    "v5p": Chip(
        name="v5p",
        platform="tpu",
        source="https://cloud.google.com/tpu/docs/v5p; int8, links: https://jax-ml.github.io/scaling-book/tpus",
        flops={"float32": 459e12, "bfloat16": 459e12, "int8": 918e12, "fp8": 459e12},
        hbm=95 * GIB,
        usable=int(95.74 * GIB),  # libtpu's number is above the page's
        bandwidth=2.765e12,
        ici=180e9,
        dims=3,
        pod=6144,
        wraps=4,
        longest=28,
        dcn=25e9,
        host=4,
        pcie=15e9,
        power=350,
    ),
    # Verified: 918 TFLOP/s bf16 and fp8, 1836 int8, 32 GB, 1638 GB/s, 800 GB/s ICI a chip (4 ports), 256 chips, DCN 100 Gb/s a chip (the Scaling Book
    # counts 25 GB/s a host on all chips).
    "v6e": Chip(
        name="v6e",
        platform="tpu",
        source="https://cloud.google.com/tpu/docs/v6e; links: https://jax-ml.github.io/scaling-book/tpus",
        flops={"float32": 918e12, "bfloat16": 918e12, "int8": 1836e12, "fp8": 918e12},
        hbm=32 * GIB,
        usable=int(31.25 * GIB),
        bandwidth=1.638e12,
        ici=180e9,
        dims=2,
        pod=256,
        wraps=16,
        longest=16,
        dcn=100e9,
        host=8,
        pcie=32e9,
        power=400,  # from TPU7x's and Google's "twice the performance per watt of v6e"
    ),
    # Verified: 2307 TFLOP/s bf16, 4614 fp8, 192 GiB, 7380 GB/s, 1200 GB/s ICI a chip, DCN 100 Gb/s a chip, two devices a chip, 9216 chips. No int8 is given.
    # Links as in https://github.com/jax-ml/scaling-book/pull/124. Between the chiplets: six times a link, as the page says (not found again).
    "tpu7x": Chip(
        name="tpu7x",
        platform="tpu",
        source="https://cloud.google.com/tpu/docs/tpu7x",
        flops={"float32": 2307e12, "bfloat16": 2307e12, "fp8": 4614e12},
        hbm=192 * GIB,
        usable=int(94.75 * GIB),
        bandwidth=7.38e12,
        cores=2,
        die=540e9,
        ici=180e9,
        dims=3,
        pod=9216,
        wraps=4,
        longest=36,
        dcn=50e9,
        host=4,
        pcie=32e9,
        power=1000,  # "nearly 10 MW" for a pod of 9216
    ),
    # bf16, int8 and bandwidth verified in https://jax-ml.github.io/scaling-book/gpus; TF32, NVLink and power are the sheet's, not looked up again.
    "a100": Chip(
        name="a100",
        platform="gpu",
        source="https://www.nvidia.com/en-us/data-center/a100 (80 GB SXM); 200 Gb/s HDR a GPU: DGX A100",
        flops={"float32": 156e12, "bfloat16": 312e12, "int8": 624e12},
        hbm=80e9,
        usable=int(0.95 * 80e9),
        bandwidth=2.039e12,
        nvlink=300e9,
        domain=8,
        ib=25e9,
        dcn=200e9,
        host=8,
        pcie=32e9,
        power=400,
    ),
    # Verified in https://glennklockwood.com/garden/processors/h100 (matrix, not sparse): TF32 494.7, bf16 989.4, fp8 and int8 1978.9 TFLOP/s, 3.35 TB/s,
    # NVLink 900 GB/s both ways, 700 W.
    "h100": Chip(
        name="h100",
        platform="gpu",
        source="https://www.nvidia.com/en-us/data-center/h100 (SXM); 400 Gb/s NDR a GPU: DGX H100",
        flops={"float32": 494.7e12, "bfloat16": 989.4e12, "int8": 1978.9e12, "fp8": 1978.9e12},
        hbm=80e9,
        usable=int(0.95 * 80e9),
        bandwidth=3.35e12,
        nvlink=450e9,
        domain=8,
        ib=50e9,
        dcn=400e9,
        host=8,
        pcie=64e9,
        power=700,
    ),
    # The arithmetic of an H100; 141 GB and 4.8 TB/s verified in https://jax-ml.github.io/scaling-book/gpus.
    "h200": Chip(
        name="h200",
        platform="gpu",
        source="https://www.nvidia.com/en-us/data-center/h200 (SXM)",
        flops={"float32": 494.7e12, "bfloat16": 989.4e12, "int8": 1978.9e12, "fp8": 1978.9e12},
        hbm=141e9,
        usable=int(0.95 * 141e9),
        bandwidth=4.8e12,
        nvlink=450e9,
        domain=8,
        ib=50e9,
        dcn=400e9,
        host=8,
        pcie=64e9,
        power=700,
    ),
    # Verified in https://glennklockwood.com/garden/processors/B200 (HGX at 1000 W, matrix, not sparse): TF32 1100, bf16 2250, fp8 and int8 4500 TFLOP/s,
    # 8 TB/s, NVLink 900 GB/s each way; HGX boards sell 180 of 192 GB.
    "b200": Chip(
        name="b200",
        platform="gpu",
        source="https://www.nvidia.com/en-us/data-center/hgx (HGX B200)",
        flops={"float32": 1100e12, "bfloat16": 2250e12, "int8": 4500e12, "fp8": 4500e12},
        hbm=180e9,
        usable=int(0.95 * 180e9),
        bandwidth=8e12,
        nvlink=900e9,
        domain=8,
        ib=50e9,
        dcn=400e9,
        host=8,
        pcie=64e9,
        power=1000,
    ),
}
