"""Sampling beside diffusers in one run: the same U-Net, weights, x_T, τ (leading) and batch, η = 0.

    python -m experiments.benchmarks.sampling [--batch 8] [--steps 10] [--rounds 4] [--json FILE]

Ours is `make_sampler`; theirs the loop over `DDIMScheduler` and `UNet2DModel`, eager (both memory
layouts) and through `torch.compile`, and `DDIMPipeline`. All take turns within each round, so that
a busy machine slows all; a ratio is the median over rounds of their time / ours (above 1: ours is
faster), with the smallest and largest. "network" calls our jitted network S times: ours over it is
what the sampler itself costs. GFLOP/s count the network's convolutions and products, whatever
either library does to save some, beside what each library's matrix product reaches. Memory is that
of a process that draws with one side alone: on a CPU its peak resident size (Linux), and by how
much loading the weights and drawing raised it above the imports; on a GPU the allocator's peak.
There the default is bfloat16 and several batches. Sides that cannot run here are named, with the
reason.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries share a GPU

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax._unet_config import UNetConfig
from ddim_jax.pretrained import PAPER, to_facts
from ddim_jax.schedule import ScheduleConfig
from ddim_jax.unet import build, make_apply

OURS, NETWORK, EAGER, LAST = "ours", "network", "eager", "eager, channels last"
COMPILED, PIPELINE = "torch.compile", "pipeline, eager"
SMALL = UNetConfig(image_size=8, channels=32, multipliers=(1, 2), attention_resolutions=(4,))
Call = Callable[[], Any]


def random_model(config: UNetConfig) -> ddim.Model:
    """Random weights, none of them zero, so that outputs can be compared."""
    apply_fn, params = build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.01 * rng.standard_normal(p.shape).astype(np.float32), params
    )
    schedule = ScheduleConfig()
    return ddim.Model(apply_fn, params, schedule.build(), config, to_facts(schedule, config))


def our_sides(model: ddim.Model, x_T: np.ndarray, steps: int) -> dict[str, Call]:
    """Name → a call that draws, and waits for the result."""
    tau = ddim.timesteps(model.schedule.num_steps, steps, "leading")
    sampler = ddim.make_sampler(model.apply_fn, model.schedule, tau, prediction=model.prediction)
    network, x, t = jax.jit(model.apply_fn), jnp.asarray(x_T), jnp.full(len(x_T), 500)

    def calls() -> Any:
        return [network(model.params, x, t).block_until_ready() for _ in range(steps)][-1]

    return {OURS: lambda: sampler(model.params, x).block_until_ready(), NETWORK: calls}


def their_sides(
    folder: str, x_T: np.ndarray, steps: int, dtype: str, mode: str, only: str | None = None
) -> tuple[dict[str, Call], dict[str, str]]:
    """As `our_sides`, all or `only` one, and name → why it does not run."""
    names = (EAGER, LAST, COMPILED, PIPELINE)
    for package in ("torch", "diffusers"):
        if importlib.util.find_spec(package) is None:
            return {}, dict.fromkeys(names, f"{package} is not installed")
    import torch
    from diffusers import DDIMPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return {}, dict.fromkeys(names, "this PyTorch sees no GPU")
    place = {"device": "cuda" if on_gpu else "cpu", "dtype": getattr(torch, dtype)}
    start = torch.from_numpy(x_T).permute(0, 3, 1, 2).to(**place)

    def load() -> Any:
        pipeline = DDIMPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(**place)

    def loop(layout: Any, wrap: Callable[[Any], Any] = lambda network: network) -> Call:
        pipeline = load()
        scheduler, network = pipeline.scheduler, wrap(pipeline.unet.to(memory_format=layout))

        @torch.inference_mode()
        def draw() -> Any:
            scheduler.set_timesteps(steps)
            x = start.contiguous(memory_format=layout)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t).sample, t, x, eta=0.0).prev_sample
            return x.permute(0, 2, 3, 1).float().cpu()  # waits for a GPU

        return draw

    def whole() -> Call:
        pipeline = load()
        options = {"eta": 0.0, "num_inference_steps": steps, "output_type": "np"}
        return lambda: 2 * pipeline(len(x_T), noise(), **options).images - 1

    builders = {
        EAGER: lambda: loop(torch.contiguous_format),
        LAST: lambda: loop(torch.channels_last),
        COMPILED: lambda: loop(torch.contiguous_format, lambda m: torch.compile(m, mode=mode)),
        PIPELINE: whole,
    }
    missing = {}
    if not on_gpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        missing[COMPILED] = "no C++ compiler"
    if dtype != "float32":
        missing[PIPELINE] = f"it turns its images into NumPy's, which has no {dtype}"
    wanted = [n for n in builders if n not in missing and only in (None, n)]
    return {name: builders[name]() for name in wanted}, missing


def noise() -> Any:
    """PyTorch's generator in the state that the pipeline's x_T, and all others', begin with."""
    import torch

    return torch.Generator().manual_seed(0)


def latents(batch: int, config: UNetConfig, dtype: str) -> np.ndarray:
    """x_T (B, H, W, C) as the pipeline draws it, or NumPy's where PyTorch is missing."""
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    if importlib.util.find_spec("torch") is None:
        x_T = np.random.default_rng(0).standard_normal(shape, np.float32)
    else:
        import torch

        x_T = torch.randn(shape, generator=noise(), dtype=getattr(torch, dtype)).float().numpy()
    return np.ascontiguousarray(x_T.transpose(0, 2, 3, 1))


def seconds(call: Call) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def disagreement(ours: Any, theirs: Any, *, clipped: bool) -> float:
    """The largest difference, relative to the largest pixel if that is above 1."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    a = a.clip(-1, 1) if clipped else a
    return float(np.abs(a - b).max() / max(1, np.abs(a).max()))


def matmul_rates(dtype: str, n: int) -> dict[str, float]:
    """GFLOP/s of a product of two random n × n matrices: the median of 10, after one."""
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    x, dot = jnp.asarray(a, dtype), jax.jit(jnp.dot)
    calls: dict[str, Call] = {"jax": lambda: dot(x, x).block_until_ready()}
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpu = jax.default_backend() == "gpu"
        if not gpu or torch.cuda.is_available():
            y = torch.from_numpy(a).to("cuda" if gpu else "cpu", getattr(torch, dtype))
            calls["torch"] = lambda: (y @ y, gpu and torch.cuda.synchronize())
    for call in calls.values():
        call()
    times = {name: statistics.median(seconds(f) for _ in range(10)) for name, f in calls.items()}
    return {name: 2e-9 * n**3 / s for name, s in times.items()}


def peak_memory(side: str, args: argparse.Namespace, batch: int, folder: str) -> dict[str, float]:
    """MB, of a new process that draws once, in two steps, with that side alone."""
    words = ["--memory-of", side, folder, "--batch", str(batch), "--steps", "2"]
    words += ["--dtype", args.dtype, "--compile-mode", args.compile_mode]
    words += ["--small"] * args.small
    command = [sys.executable, "-m", "experiments.benchmarks.sampling", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(side: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """What `peak_memory` reports, within that process."""

    def resident() -> float:  # ru_maxrss would begin with that of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")

    config = SMALL if args.small else PAPER["cifar10"]
    shape = (args.batch[0], config.image_size, config.image_size, config.in_channels)
    x_T = np.random.default_rng(0).standard_normal(shape, np.float32)
    on_gpu = jax.default_backend() == "gpu"
    if side != OURS:
        import torch
        from diffusers import DDIMPipeline  # noqa: F401
    before = resident()
    if side == OURS:
        call = our_sides(load_ours(folder, args.dtype), x_T, args.steps)[side]
    else:
        call = their_sides(folder, x_T, args.steps, args.dtype, args.compile_mode, side)[0][side]
    call()
    if not on_gpu:
        return {"peak": resident(), "above imports": resident() - before}
    if side == OURS:
        return {"peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20}
    return {"peak": torch.cuda.max_memory_allocated() / 2**20}


def load_ours(folder: str, dtype: str) -> ddim.Model:
    """The weights of the diffusers folder, computing in dtype."""
    model = ddim.load_model(folder)
    config = dataclasses.replace(model.config, dtype=dtype)
    return model._replace(config=config, apply_fn=make_apply(config))


def machine() -> dict[str, Any]:
    """What computes here, and the versions of what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    packages = [p for p in ("jax", "flax", "torch", "diffusers") if importlib.util.find_spec(p)]
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def measure(batch: int, folder: str, args: argparse.Namespace, flops: float) -> dict[str, Any]:
    """All sides at one batch: times, ratios, agreement, compile time and memory."""
    model = load_ours(folder, args.dtype)
    x_T = latents(batch, model.config, args.dtype)
    theirs, missing = their_sides(folder, x_T, args.steps, args.dtype, args.compile_mode)
    sides = our_sides(model, x_T, args.steps) | theirs
    images: dict[str, Any] = {}
    first: dict[str, float] = {}
    for name, call in sides.items():
        start = time.perf_counter()
        images[name] = call()
        first[name] = time.perf_counter() - start
    rounds = [{name: seconds(call) for name, call in sides.items()} for _ in range(args.rounds)]
    table: dict[str, Any] = {}
    for name in sides:
        times = [r[name] for r in rounds]
        middle = statistics.median(times)
        table[name] = row = {
            "seconds": middle,
            "images_per_second": batch / middle,
            "gflops": flops * batch * args.steps / middle / 1e9,
            "first_call_minus_median": first[name] - middle,
            "time_over_ours": spread([r[name] / r[OURS] for r in rounds]),
        }
        if name in theirs:
            row["disagreement"] = disagreement(images[OURS], images[name], clipped=name == PIPELINE)
        if name != NETWORK and not args.no_memory:
            row["memory_mb"] = peak_memory(name, args, batch, folder)
    return {
        "sides": table,
        "not run": missing,
        "sampler_over_network": spread([r[OURS] / r[NETWORK] for r in rounds]),
        "largest_pixel": float(np.abs(np.asarray(images[OURS])).max()),
        "rounds": rounds,
    }


def show(batch: int, found: dict[str, Any]) -> None:
    """One table as Markdown."""
    print(f"\n| batch {batch} | s | images/s | GFLOP/s | time / ours | compile s | MB | differs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found["sides"].items():
        ratio, memory = row["time_over_ours"], row.get("memory_mb", {})
        cells = [
            name,
            f"{row['seconds']:.3f}",
            f"{row['images_per_second']:.2f}",
            f"{row['gflops']:.0f}",
            f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})",
            f"{row['first_call_minus_median']:.1f}" if name in (OURS, COMPILED) else "",
            " / ".join(f"{v:.0f}" for v in memory.values()),
            f"{row['disagreement']:.1e}" if "disagreement" in row else "",
        ]
        print("| " + " | ".join(cells) + " |")
    for name, why in found["not run"].items():
        print(f"| {name} | not run: {why} |")
    s = found["sampler_over_network"]
    print(f"\nours / network: {s['median']:.3f} ({s['least']:.3f} to {s['most']:.3f})", flush=True)


def main() -> None:
    accelerated = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8, 32, 128, 512][: 1 + 3 * accelerated]
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if accelerated else "float32"
    )
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the script")
    parser.add_argument("--no-memory", action="store_true", help="start no further processes")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this new file too")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        side, folder = args.memory_of
        print(json.dumps(measure_memory(side, folder, args)))
        return
    if args.json and args.json.exists():
        sys.exit(f"error: {args.json} exists; choose another --json")

    from experiments.benchmarks.train_step import network_flops

    config = SMALL if args.small else PAPER["cifar10"]
    flops = network_flops(config)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.sampling", *sys.argv[1:]]),
        "machine": machine(),
        "settings": {"model": dataclasses.asdict(config), "steps": args.steps, "eta": 0.0,
                     "dtype": args.dtype, "rounds": args.rounds, "compile_mode": args.compile_mode,
                     "flops_per_image_and_call": flops},
        "gpu": "this run" if accelerated else "not run: JAX has no GPU here",
        "batches": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{parent}/inductor"  # nothing compiled before
        folder = f"{parent}/model"
        ddim.save_diffusers(folder, random_model(config))
        for batch in args.batch:
            results["batches"][batch] = found = measure(batch, folder, args, flops)
            show(batch, found)
    results["matrix_product_gflops"] = rates = matmul_rates(
        args.dtype, 8192 if accelerated else 2048
    )
    print("matrix product, GFLOP/s:", ", ".join(f"{k} {v:.0f}" for k, v in rates.items()))
    print(f"GPU: {results['gpu']}")
    if args.json:
        whole = args.json.with_name(args.json.name + ".part")
        whole.write_text(json.dumps(results, indent=1) + "\n")
        whole.replace(args.json)


if __name__ == "__main__":
    main()
