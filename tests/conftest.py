"""Strict JAX for every test: no silent promotion of dtypes or ranks."""

import os

# Before JAX is imported: eight pretended devices, so that sharding is tested everywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", os.path.abspath(".cache/jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

settings.register_profile(
    "ddim",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),  # new cases at every desk, the same ones in CI
)
settings.load_profile("ddim")


@pytest.fixture
def key():
    """One fixed key, so that a failure repeats."""
    return jax.random.key(0)
