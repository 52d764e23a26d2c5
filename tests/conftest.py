"""Strict JAX for every test: no silent promotion of dtypes or ranks."""

import contextlib
import functools
import gc
import itertools
import mmap
import os
import pathlib

# Before JAX is imported, and for the processes that tests start. What was compiled once, down to
# single operations, is read again, which is five times as fast.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".cache/jax"))
os.environ.setdefault("DDIM_JAX_CACHE", os.path.abspath(".cache/data"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # several spin while they wait for one another
import jax
import jax._src.interpreters.mlir  # in every JAX, but promised by none
import jaxlib
import pytest
from hypothesis import HealthCheck, settings

# The tests compile much and compute little: so a program compiles in a quarter of the time.
FAST = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def known(flag):
    """Whether this XLA has the flag; one that it has not would end the process."""
    libraries = pathlib.Path(jaxlib.__file__).parent.glob("*.so*")
    library = max(libraries, key=lambda path: path.stat().st_size)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        return code.find(f"\0{flag}\0".encode()) >= 0  # a field that is gone keeps its name there


if "XLA_FLAGS" not in os.environ:  # read when JAX first looks for devices
    os.environ["XLA_FLAGS"] = " ".join(f"--{k}={v}" for k, v in FAST.items() if known(k))

jax.config.update("jax_num_cpu_devices", 8)  # pretended, so that sharding is tested everywhere
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Each program is written down in a new context of MLIR, whose making costs a small one most of its
# time. Here they share one, until `forget`.
CONTEXT = getattr(jax._src.interpreters.mlir, "make_ir_context", None)
if CONTEXT is not None:
    CONTEXT = jax._src.interpreters.mlir.make_ir_context = functools.cache(CONTEXT)

gc.set_threshold(100_000, 20, 100)  # traces are many objects, and none of them garbage: a tenth

# `make test` tries the same examples everywhere and keeps none; `make test-all` explores, from a
# seed that it draws and prints: --hypothesis-profile=explore --hypothesis-seed=N.
COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("same", derandomize=True, max_examples=20, **COMMON)
settings.register_profile("explore", max_examples=500, **COMMON)
settings.load_profile("same")


@pytest.fixture
def key():
    """One fixed key, so that a failure repeats."""
    return jax.random.key(0)


@contextlib.contextmanager
def on_one_device():
    """For what is not about several: eight on a few cores are slow."""
    with pytest.MonkeyPatch.context() as patch:
        for name, devices in (("devices", jax.devices()), ("local_devices", jax.local_devices())):
            patch.setattr(jax, name, lambda devices=devices: devices[:1])
        yield


@pytest.fixture
def one_device():
    with on_one_device():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The examples in documents too, which no fixture of this file reaches."""
    with on_one_device() if isinstance(item, pytest.DoctestItem) else contextlib.nullcontext():
        return (yield)


# Pages whose examples train or draw with several programs. What they show has its quick tests.
LONG_PAGES = {
    "discrete.md",
    "evaluation.md",
    "extending.md",
    "guidance.md",
    "how-do-i.md",
    "latents.md",
    "networks.md",
    "oracles.md",
    "sampling.md",
    "solvers.md",
    "training.md",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.path.name in LONG_PAGES:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    # An entry that a killed process left half written is compiled again, and is no failure.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )


@pytest.fixture(scope="session")
def one_trace():
    """Runs and batches that differ in no program share it."""
    from ddim_jax.generation import drawing
    from ddim_jax.training import feeding, loop
    from tests.tiny import shared_draw, shared_train_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", shared_train_step)
        patch.setattr(feeding, "make_steps", functools.cache(feeding.make_steps))
        patch.setattr(drawing, "make_draw", shared_draw)
        yield


def pytest_collection_finish():
    """What was imported stays: it need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Pytest collects five times, for what warns when it is destroyed: the first finds all."""
    gc.collect()
    gc.freeze()


MODULES = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled programs are forgotten now and then; without it a worker grows to 2.5 GB."""
    yield
    if next(MODULES) % 30 == 0:
        jax.clear_caches()
        if CONTEXT is not None:
            CONTEXT.cache_clear()
