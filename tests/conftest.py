"""Eight simulated CPU devices, a compiler that hurries and a persistent compilation cache, all fixed before JAX starts."""

import os
import signal

from tests.hurry import CACHE, WORTH_KEEPING, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = flags(os.environ.get("XLA_FLAGS", ""))

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
jax.config.update("jax_default_matmul_precision", "highest")

# In a shell's background and under nohup some signals are ignored, and would be by the processes that tests interrupt: those inherit it.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs(request):
    """Drops compiled programs after each module, its own caches too: for the CPU each takes thousands of memory maps, and a process has 65,530 of them."""
    yield
    for cached in vars(request.module).values():
        if hasattr(cached, "cache_clear") and cached.__module__ == request.module.__name__:
            cached.cache_clear()
    jax.clear_caches()
