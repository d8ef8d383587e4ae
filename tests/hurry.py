"""How tests compile: they spend far longer on it than on running what they compiled. For the tests' own process (conftest.py) and for those that it starts."""

from pathlib import Path

# The HLO is optimized as ever; the machine code made of it is not, and is made by the older and quicker emitter where XLA has both.
FLAGS = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
# For a program whose bits are compared with those of another program, which at level 0 may round the same sum differently; and for one that runs
# thousands of times.
OPTIMIZED = {"xla_backend_optimization_level": 1}
# Devices that share few cores may be minutes late at a collective; by default XLA then aborts the process.
DEVICES = (
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
)
CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"
WORTH_KEEPING = 0.2  # seconds
ENVIRONMENT = {
    "XLA_FLAGS": FLAGS,
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(WORTH_KEEPING),
}


def flags(given: str) -> str:
    """`XLA_FLAGS` of the tests' own process; who gives a level of optimization has programs as users have them."""
    return " ".join(["" if "--xla_backend_optimization_level" in given else FLAGS, given, DEVICES])
