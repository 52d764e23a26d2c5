"""What the benchmarks beside PyTorch share: one network on both sides, rates and memory.

GFLOP/s count the network's convolutions and products, whatever either library does to save some;
beside them stands what each library's product of two large matrices reaches.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.networks.config import UNetConfig
from ddim_jax.networks.unet import abstract_params, build
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.weights import to_facts

OURS, NETWORK = "ours", "network"
EAGER, LAST = "eager", "eager, channels last"
COMPILED, REDUCED = "torch.compile", "torch.compile, reduce-overhead"
MODES = {COMPILED: "default", REDUCED: "reduce-overhead"}  # of torch.compile
SMALL = UNetConfig(
    image_size=8, channels=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,)
)
PASSES = 20  # timed at once where the machine's limits are measured
Call = Callable[[], Any]


def is_ours(side: str) -> bool:
    """Whether JAX computes it: "ours", "ours, --xla_flag", "network"."""
    return side.startswith((OURS, NETWORK))


def random_model(config: UNetConfig) -> ddim.Model:
    """Random weights, none of them zero, so that outputs can be compared."""
    apply_fn, params = build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.01 * rng.standard_normal(p.shape).astype(np.float32), params
    )
    schedule = ScheduleConfig()
    return ddim.Model(apply_fn, params, schedule.build(), config, to_facts(schedule, config))


def place(dtype: str = "float32") -> dict[str, Any]:
    """PyTorch's device and dtype."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device, "dtype": getattr(torch, dtype)}


def wait() -> None:
    """Until PyTorch's GPU has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wrapped(side: str, network: Any) -> Any:
    """A PyTorch network, compiled if the side says so; RuntimeError where that cannot be."""
    import torch

    if side not in MODES:
        return network
    if not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise RuntimeError("no C++ compiler")
    compiled = torch.compile(network, mode=MODES[side], dynamic=False)

    def call(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args)

    return call


def seconds(call: Call) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def network_flops(config: UNetConfig) -> float:
    """Of one image forward: 2 × the products in convolutions, dense layers and attention."""
    flops = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        name = [entry.key for entry in path]
        if name[-1] != "kernel":
            continue
        level = {"down": name[1], "up": name[1], "mid": -1}.get(name[0], 0)
        side = config.resolutions[int(level)]
        if "downsample" in name:
            taps = (3 * side // 2 - 1) ** 2  # of which one row and one column is padding
        elif leaf.ndim == 4:
            taps = (3 * side * (1 + ("upsample" in name)) - 2) ** 2
        else:
            taps = 1 if "temb" in name or "temb_proj" in name else side**2
        flops += 2 * taps * leaf.shape[-2] * leaf.shape[-1]
        if name[-2] == "q":
            flops += 2 * 2 * side**4 * leaf.shape[-1]
    return flops


@partial(jax.jit, donate_argnums=0)
def increased(x: jax.Array, passes: int) -> jax.Array:
    """x + 1 + … + 1 by so many passes over x in one program, in place.

    How many is known at run time alone: XLA neither unrolls the loop nor joins two passes.
    """
    return jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x)


def limits(side: str, dtype: str, small: bool) -> Call:
    """A call that returns FLOP/s of products of large random matrices, and memory's bytes/s.

    Of both `PASSES` are timed at once, so that waiting is no part of them; medians of ten, after
    two. Memory's is by x ← x + 1, whose bytes count as read and as written.
    """
    gpu = jax.default_backend() == "gpu" if is_ours(side) else place()["device"] == "cuda"
    n, size = (256, 2**20) if small else (8192, 2**31) if gpu else (2048, 2**28)
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    zeros = size // jnp.dtype(dtype).itemsize
    if is_ours(side):
        x, dot, held = jnp.asarray(a, dtype), jax.jit(jnp.dot), [jnp.zeros(zeros, dtype)]
        product, done = _queued(partial(dot, x, x)), jax.block_until_ready

        def memory() -> jax.Array:
            held[0] = increased(held[0], PASSES)
            return held[0]

    else:
        import torch

        y, target = torch.from_numpy(a).to(**place(dtype)), torch.zeros(zeros, **place(dtype))
        product, memory = _queued(partial(torch.matmul, y, y)), _queued(partial(target.add_, 1))
        done = lambda result: wait()  # noqa: E731

    def median(call: Call) -> float:
        times = [seconds(lambda: done(call())) for _ in range(12)]
        return statistics.median(times[2:])

    return lambda: {"flops_per_second": PASSES * 2 * n**3 / median(product),
                    "bytes_per_second": PASSES * 2 * size / median(memory)}  # fmt: skip


def _queued(call: Call) -> Call:
    """`PASSES` calls, the last one's result: on a GPU it returns before they are done."""

    def calls() -> Any:
        for _ in range(PASSES - 1):
            call()
        return call()

    return calls


def resident() -> float:
    """Peak MB of this process (Linux); ru_maxrss would begin with that of its parent."""
    found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def peak_memory(side: str, before: float) -> dict[str, float]:
    """MB of this process: on a GPU the allocator's peak, else that of `resident`, and above it."""
    if is_ours(side):
        stats = jax.local_devices()[0].memory_stats() if jax.default_backend() == "gpu" else None
        peak = stats and stats["peak_bytes_in_use"] / 2**20
    else:
        import torch

        peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    if peak:
        return {"peak": peak}
    return {"peak": resident(), "above imports": resident() - before}
