"""Eight simulated CPU devices and a persistent compilation cache, both fixed before JAX starts."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Devices that share few cores may be minutes late at a collective; by default XLA then aborts the process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
)

import jax
import pytest

CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs(request):
    """Drops compiled programs after each module, its own caches too: for the CPU each takes thousands of memory maps, and a process has 65,530 of them."""
    yield
    for cached in vars(request.module).values():
        if hasattr(cached, "cache_clear") and cached.__module__ == request.module.__name__:
            cached.cache_clear()
    jax.clear_caches()
