"""Sampling beside diffusers in one run: the same U-Net, weights, x_T, τ (leading) and batch, η = 0.

    python -m experiments.benchmarks.sampling [--batch 8] [--steps 10] [--rounds 4] [--json FILE]

Ours is `make_sampler`; theirs the loop over `DDIMScheduler` and `UNet2DModel`, eager (both memory
layouts) and through `torch.compile`, and `DDIMPipeline`. "network" calls our jitted network S
times: ours over it is what the sampler itself costs. On a GPU the default is bfloat16 and several
batches. `peers` says how all is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.networks.config import UNetConfig
from experiments.benchmarks import peers
from experiments.benchmarks.peers import OURS, Call, Sides

NETWORK, EAGER, LAST = "network", "eager", "eager, channels last"
COMPILED, PIPELINE = "torch.compile", "pipeline, eager"
OTHERS = (EAGER, LAST, COMPILED, PIPELINE)


def our_sides(model: ddim.Model, x_T: np.ndarray, steps: int) -> Sides:
    """Name → a call that draws, and waits for the result."""
    tau = ddim.timesteps(model.schedule.num_steps, steps, "leading")
    sampler = ddim.make_sampler(model, tau)
    network, x, t = jax.jit(model.apply_fn), jnp.asarray(x_T), jnp.full(len(x_T), 500)

    def calls() -> Any:
        return [network(model.params, x, t).block_until_ready() for _ in range(steps)][-1]

    return {OURS: lambda: sampler(x).block_until_ready(), NETWORK: calls}


def their_sides(
    folder: str,
    x_T: np.ndarray,
    steps: int,
    dtype: str,
    mode: str,
    only: Sequence[str] | None = None,
) -> tuple[Sides, dict[str, str]]:
    """As `our_sides`, all or `only` some, and name → why it does not run."""
    names = [n for n in OTHERS if only is None or n in only]
    if reason := peers.missing("torch", "diffusers"):
        return {}, dict.fromkeys(names, reason)
    import torch
    from diffusers import DDIMPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch._dynamo.reset()
    place = peers.place(dtype)
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

    # The layout that convolutions of 16 bits prefer on a GPU.
    best = torch.channels_last if dtype == "bfloat16" else torch.contiguous_format
    builders = {
        EAGER: lambda: loop(torch.contiguous_format),
        LAST: lambda: loop(torch.channels_last),
        COMPILED: lambda: loop(best, partial(torch.compile, mode=mode, dynamic=False)),
        PIPELINE: whole,
    }
    absent = {}
    if place["device"] == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        absent[COMPILED] = "no C++ compiler"
    if dtype != "float32":
        absent[PIPELINE] = f"it turns its images into NumPy's, which has no {dtype}"
    absent = {n: why for n, why in absent.items() if n in names}
    return {n: builders[n]() for n in names if n not in absent}, absent


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


def disagreement(ours: Any, theirs: Any, *, clipped: bool) -> float:
    """The largest difference, relative to the largest pixel if that is above 1."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    a = a.clip(-1, 1) if clipped else a
    return float(np.abs(a - b).max() / max(1, np.abs(a).max()))


def measure(args: argparse.Namespace, folder: str, batch: int, flops: float) -> dict[str, Any]:
    """All sides at one batch: times, ratios, agreement, compile time and memory."""
    model = peers.load_ours(folder, args.dtype)
    x_T = latents(batch, model.config, args.dtype)
    theirs, absent = their_sides(folder, x_T, args.steps, args.dtype, args.compile_mode, args.only)
    sides = our_sides(model, x_T, args.steps) | theirs
    found = peers.race(sides, args.rounds, batch, flops * batch * args.steps)
    images = found.pop("first")
    for name, row in found["sides"].items():
        if name in theirs:
            row["disagreement"] = disagreement(images[OURS], images[name], clipped=name == PIPELINE)
        if name != NETWORK and not args.no_memory:
            words = ("--steps", "2")
            module = "experiments.benchmarks.sampling"
            row["memory_mb"] = peers.memory_of(module, name, folder, batch, args, *words)
    ratios = [r[OURS] / r[NETWORK] for r in found["rounds"]]
    found |= {
        "not run": absent,
        "sampler_over_network": peers.spread(ratios),
        "largest_pixel": float(np.abs(np.asarray(images[OURS])).max()),
    }
    peers.show(f"batch {batch}, S = {args.steps}", found)
    s = found["sampler_over_network"]
    print(f"\nours / network: {s['median']:.3f} ({s['least']:.3f} to {s['most']:.3f})", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and prints; with --json writes."""
    args = peers.arguments(__doc__, argv, OTHERS, steps=10)
    if args.memory_of:
        side, folder = args.memory_of
        x_T = latents(args.batch[0], args.config, args.dtype)

        def make() -> Call:
            if side == OURS:
                return our_sides(peers.load_ours(folder, args.dtype), x_T, args.steps)[side]
            words = (args.dtype, args.compile_mode, [side])
            return their_sides(folder, x_T, args.steps, *words)[0][side]

        peers.measure_memory(side, make)
        return
    peers.benchmark("sampling", args, partial(measure, args), steps=args.steps, eta=0.0)


if __name__ == "__main__":
    main()
