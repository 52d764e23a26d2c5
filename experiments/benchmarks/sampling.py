"""Sampling beside diffusers: the same U-Net, weights, x_T, τ (leading) and batch, η = 0.

Ours is `make_sampler`; theirs the loop over `DDIMScheduler` and `UNet2DModel`, eager and through
`torch.compile`. "network" calls our jitted network S times: ours over it is what the sampler itself
costs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from experiments.benchmarks import peers
from experiments.benchmarks.peers import Call


def side(spec: dict[str, Any]) -> Call:
    """A call that draws, waits for the result and returns it, (B, H, W, C)."""
    return (_ours if peers.is_ours(spec["side"]) else _theirs)(spec)


def latents(batch: int, shape: tuple[int, ...]) -> np.ndarray:
    """x_T (B, H, W, C)."""
    return np.random.default_rng(0).standard_normal((batch, *shape), np.float32)


def _ours(spec: dict[str, Any]) -> Call:
    model, steps = ddim.load_model(spec["folder"], dtype=spec["dtype"]), spec["steps"]
    x = jnp.asarray(latents(spec["batch"], model.image_shape))
    tau = ddim.timesteps(model.schedule.num_steps, steps, "leading")
    if spec["side"] == peers.NETWORK:
        network, t = jax.jit(model.apply_fn), jnp.full(len(x), 500)
        return lambda: [
            network(model.params, x, t).block_until_ready() for _ in range(steps)
        ][-1]  # fmt: skip
    sampler = ddim.make_sampler(model, tau)
    return lambda: sampler(x).block_until_ready()


def _theirs(spec: dict[str, Any]) -> Call:
    import torch
    from diffusers import DDIMPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place, side = peers.place(spec["dtype"]), spec["side"]
    pipeline = DDIMPipeline.from_pretrained(spec["folder"]).to(**place)
    # The layout that convolutions of 16 bits prefer on a GPU.
    last = side == peers.LAST or (side in peers.MODES and spec["dtype"] == "bfloat16")
    layout = torch.channels_last if last else torch.contiguous_format
    scheduler, unet = pipeline.scheduler, pipeline.unet.eval().to(memory_format=layout)
    config = unet.config
    x_T = latents(spec["batch"], (config.sample_size, config.sample_size, config.in_channels))
    start = torch.from_numpy(x_T).permute(0, 3, 1, 2).to(**place).contiguous(memory_format=layout)
    scheduler.set_timesteps(spec["steps"])
    # The scheduler's tables lie on the CPU; CUDA graphs take their inputs from the GPU.
    times = [(t, t.clone().to(place["device"])) for t in scheduler.timesteps]
    network = peers.wrapped(side, unet)

    @torch.inference_mode()
    def draw() -> Any:
        x = start
        for t, on_device in times:
            x = scheduler.step(network(x, on_device).sample, t, x, eta=0.0).prev_sample
        peers.wait()
        return x.permute(0, 2, 3, 1)

    return draw


def disagreement(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest pixel if that is above 1."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(a - b).max() / max(1, np.abs(a).max()))
