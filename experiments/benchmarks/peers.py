"""What the benchmarks beside PyTorch share: one network on both sides, turns, rates and memory.

All sides take turns within each round, so that a busy machine slows all; a ratio is the median over
rounds of a side's time / ours (above 1: ours is faster), with the smallest and largest. GFLOP/s
count the network's convolutions and products, whatever either library does to save some; beside
them stands what each library's product of two large matrices reaches. Memory is that of a process
that runs one side alone: on a CPU its peak resident size (Linux), and by how much the weights and
the work raised it above the imports; on a GPU the allocator's peak. Compile time is that of the
first call less the median. Sides that cannot run are named, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries share a GPU

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.networks.config import UNetConfig
from ddim_jax.networks.paper import PAPER
from ddim_jax.networks.unet import abstract_params, build, make_apply
from ddim_jax.process.schedule import ScheduleConfig
from ddim_jax.weights import to_facts
from experiments.provenance import device, versions, write_json

OURS = "ours"
SMALL = UNetConfig(
    image_size=8, channels=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,)
)
Call = Callable[[], Any]
Sides = dict[str, Call]


def arguments(
    doc: str, argv: Sequence[str] | None, others: Sequence[str], **defaults: int
) -> argparse.Namespace:
    """The common arguments; `on_gpu` says where JAX computes.

    Args:
      doc: of the script.
      argv: words of the command line; those of this process by default.
      others: names of the sides that are not ours.
      **defaults: further numbers.
    """
    on_gpu = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512] if on_gpu else [8])
    parser.add_argument("--rounds", type=int, default=10 if on_gpu else 4)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[on_gpu])
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--only", nargs="+", choices=others, help="of the other sides")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the script")
    parser.add_argument("--no-memory", action="store_true", help="start no further processes")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this new file too")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # SIDE FOLDER
    args = parser.parse_args(argv)
    if least := [n for n in ("rounds", *defaults) if getattr(args, n) < 1]:
        parser.error(f"--{least[0]} must be at least 1")
    if min(args.batch) < 1:
        parser.error("--batch must be at least 1")
    args.on_gpu, args.config = on_gpu, SMALL if args.small else PAPER["cifar10"]
    if args.json and args.json.exists():
        parser.error(f"{args.json} exists; choose another --json")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"there is no folder {args.json.parent} for --json; make it first")
    return args


def random_model(config: UNetConfig) -> ddim.Model:
    """Random weights, none of them zero, so that outputs can be compared."""
    apply_fn, params = build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.01 * rng.standard_normal(p.shape).astype(np.float32), params
    )
    schedule = ScheduleConfig()
    return ddim.Model(apply_fn, params, schedule.build(), config, to_facts(schedule, config))


def load_ours(folder: str, dtype: str) -> ddim.Model:
    """The weights of a diffusers folder, computing in dtype."""
    model = ddim.load_model(folder)
    config = dataclasses.replace(model.config, dtype=dtype)
    return model._replace(config=config, apply_fn=make_apply(config))


def missing(*packages: str) -> str | None:
    """Why the other sides cannot run, if so."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "this PyTorch sees no GPU"
    return None


def place(dtype: str = "float32") -> dict[str, Any]:
    """PyTorch's device and dtype."""
    import torch

    return {
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "dtype": getattr(torch, dtype),
    }


def wait() -> None:
    """Until PyTorch's GPU has finished."""
    import torch

    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()


def seconds(call: Call) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def race(sides: Mapping[str, Call], rounds: int, batch: int, flops: float) -> dict[str, Any]:
    """Times of all sides in turns.

    Args:
      sides: name → a call that waits for its result; one is `OURS`.
      rounds: after two calls of each, of which the first compiles.
      batch: images in a call.
      flops: of a call.

    Returns:
      {"sides": name → figures, "rounds": seconds, "first": what each side's first call returned}.
    """
    first: dict[str, Any] = {}
    compiling: dict[str, float] = {}
    for name, call in sides.items():
        start = time.perf_counter()
        first[name] = call()
        compiling[name] = time.perf_counter() - start
        call()
    times = [{name: seconds(call) for name, call in sides.items()} for _ in range(rounds)]
    table = {}
    for name in sides:
        middle = statistics.median(t[name] for t in times)
        table[name] = {
            "seconds": middle,
            "images_per_second": batch / middle,
            "gflops": flops / middle / 1e9,
            "compile_seconds": max(0.0, compiling[name] - middle),
            "time_over_ours": spread([t[name] / t[OURS] for t in times]),
        }
    return {"sides": table, "rounds": times, "first": first}


def show(title: str, found: Mapping[str, Any]) -> None:
    """One table as Markdown."""
    print(f"\n| {title} | s | images/s | GFLOP/s | time / ours | compile s | MB | differs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found["sides"].items():
        ratio, memory = row["time_over_ours"], row.get("memory_mb", {})
        cells = [
            name,
            f"{row['seconds']:.4f}",
            f"{row['images_per_second']:.4g}",
            f"{row['gflops']:.0f}",
            f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})",
            f"{row['compile_seconds']:.1f}",
            " / ".join(f"{v:.0f}" for v in memory.values()),
            f"{row['disagreement']:.1e}" if "disagreement" in row else "",
        ]
        print("| " + " | ".join(cells) + " |")
    for name, why in found["not run"].items():
        print(f"| {name} | not run: {why} |")
    sys.stdout.flush()


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


def matmul_rates(dtype: str) -> dict[str, float]:
    """GFLOP/s of a product of two large random matrices: the median of 10, after one."""
    n = 8192 if jax.default_backend() == "gpu" else 2048
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    x, dot = jnp.asarray(a, dtype), jax.jit(jnp.dot)
    calls: Sides = {"jax": lambda: dot(x, x).block_until_ready()}
    if missing("torch") is None:
        import torch

        y = torch.from_numpy(a).to(**place(dtype))
        calls["torch"] = lambda: (y @ y, wait())
    for call in calls.values():
        call()
    times = {name: statistics.median(seconds(f) for _ in range(10)) for name, f in calls.items()}
    return {name: 2e-9 * n**3 / s for name, s in times.items()}


def memory_of(module: str, side: str, folder: str, batch: int, args: argparse.Namespace,
              *words: str) -> dict[str, float]:  # fmt: skip
    """MB, of a new process of the same benchmark that runs that side alone."""
    words += ("--memory-of", side, folder, "--batch", str(batch), "--dtype", args.dtype)
    words += ("--compile-mode", args.compile_mode) + ("--small",) * args.small
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(side: str, make: Callable[[], Call]) -> None:
    """Prints what `memory_of` reads, within that process; `make` builds the side's call."""

    def resident() -> float:  # ru_maxrss would begin with that of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")

    if side != OURS:
        import torch
        from diffusers import DDIMPipeline  # noqa: F401
    before = resident()
    make()()
    if jax.default_backend() == "cpu":
        found = {"peak": resident(), "above imports": resident() - before}
    elif side == OURS:
        found = {"peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20}
    else:
        found = {"peak": torch.cuda.max_memory_allocated() / 2**20}
    print(json.dumps(found))


def benchmark(
    name: str, args: argparse.Namespace, measure: Callable[[str, int, float], Any], **settings: Any
) -> None:
    """Every batch, the matrix product, and the JSON file.

    Args:
      name: of the module.
      args: from `arguments`.
      measure: (diffusers folder, batch, FLOP of one image and network call) → figures.
      **settings: what else the file should say.
    """
    flops = network_flops(args.config)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", f"experiments.benchmarks.{name}", *sys.argv[1:]]),
        "machine": device() | {"load": os.getloadavg()[0],
                               "versions": versions("flax", "torch", "diffusers"),
                               "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "settings": {"model": args.config.facts(), "dtype": args.dtype, **settings,
                     "rounds": args.rounds, "compile_mode": args.compile_mode,
                     "flops_per_image_and_call": flops},
        "batches": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{parent}/inductor"  # nothing compiled before
        folder = f"{parent}/model"
        ddim.save_diffusers(folder, random_model(args.config))
        for batch in args.batch:
            results["batches"][batch] = measure(folder, batch, flops)
            if args.json:
                write_json(args.json, results)  # so that a later failure loses nothing
    results["matrix_product_gflops"] = rates = matmul_rates(args.dtype)
    print("\nmatrix product, GFLOP/s:", ", ".join(f"{k} {v:.0f}" for k, v in rates.items()))
    kind = results["machine"]["kind"]
    print(f"{kind}, {args.dtype}" + ("" if args.on_gpu else "; not run on a GPU"))
    if args.json:
        write_json(args.json, results)
