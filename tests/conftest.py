"""Strict JAX for every test: no silent promotion of dtypes or ranks."""

import itertools
import os

# Before JAX is imported, and for the processes that tests start. What was compiled once, down to
# single operations, is read again, which is five times as fast.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The tests compile much and compute little: without LLVM's passes a quarter of the time goes.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)  # pretended, so that sharding is tested everywhere
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# `make test` tries the same examples everywhere and keeps none; `make test-all` explores, from a
# seed that it draws and prints: --hypothesis-profile=explore --hypothesis-seed=N.
COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("same", derandomize=True, max_examples=50, **COMMON)
settings.register_profile("explore", max_examples=500, **COMMON)
settings.load_profile("same")


@pytest.fixture
def key():
    """One fixed key, so that a failure repeats."""
    return jax.random.key(0)


def pytest_configure(config):
    # An entry that a killed process left half written is compiled again, and is no failure.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )


MODULES = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs are forgotten after every ten modules, or a worker grows to gigabytes."""
    yield
    if next(MODULES) % 10 == 0:
        jax.clear_caches()
