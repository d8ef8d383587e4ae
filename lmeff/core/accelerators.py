"""Accelerators as the operating system shows them, without JAX, which would open them to look."""

import re
from pathlib import Path

GOOGLE = "0x1ae0"
# PCI devices that are TPUs, as JAX looks for them (jax/_src/hardware_utils.py).
TPUS = {
    "0x0027": "v3",
    "0x0056": "",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}
DEVICES = {"TPU": r"/dev/(accel\d+|vfio/\d+)", "NVIDIA": r"/dev/nvidia\d+", "AMD": r"/dev/kfd"}


def hardware(root: Path = Path("/")) -> dict[str, int]:
    """How many accelerators of each kind the operating system shows."""
    names = [f"/dev/{file.relative_to(root / 'dev')}" for file in (root / "dev").glob("*")]
    names += [f"/dev/vfio/{file.name}" for file in (root / "dev/vfio").glob("*")]
    counted = {kind: sum(bool(re.fullmatch(name, file)) for file in names) for kind, name in DEVICES.items()}
    chips = _tpu_chips(root)
    if not any(re.fullmatch(r"/dev/accel\d+", file) for file in names):
        counted["TPU"] = chips  # groups of vfio may be anything; those of a TPU are on its PCI bus
    return {kind: count for kind, count in counted.items() if count}


def _tpu_chips(root: Path) -> int:
    found = 0
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text(encoding="ascii").strip() == GOOGLE:
            found += (vendor.parent / "device").read_text(encoding="ascii").strip() in TPUS
    return found
