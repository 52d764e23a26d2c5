"""Training beside PyTorch in one run: the same U-Net, weights, batch and optimiser.

    python -m experiments.benchmarks.training [--batch 8] [--rounds 4] [--json FILE]

Three tables: forward (no dropout), forward + backward, and the whole step: noise, loss, gradients,
clipping, Adam and moving average. Ours is `make_train_step`; theirs diffusers' `UNet2DModel` with
PyTorch's fused Adam, eager and through `torch.compile`, channels last; bfloat16 by autocast, with
weights in float32 as ours. Operations are counted once forward and twice backward. `peers` says how
all is measured.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import init_state, make_train_step
from experiments.benchmarks import peers
from experiments.benchmarks.peers import OURS, Call, Sides

EAGER, COMPILED = "eager", "torch.compile"
FORWARD, BACKWARD, STEP = "forward", "forward + backward", "train step"
WORK = {FORWARD: 1, BACKWARD: 3, STEP: 3}  # in forward passes
T = 1000


def inputs(batch: int, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, C) in [−1, 1] and times (B,) in 1..T."""
    rng, size = np.random.default_rng(0), args.config.image_size
    images = rng.uniform(-1, 1, (batch, size, size, args.config.in_channels)).astype(np.float32)
    return images, rng.integers(1, T + 1, batch)


def our_sides(model: ddim.Model, train: TrainConfig, image: np.ndarray, t: np.ndarray) -> Sides:
    """Table → a call that waits for its result."""
    apply_fn, params = model.apply_fn, jax.tree.map(jnp.asarray, model.params)
    x, times, key = jnp.asarray(image), jnp.asarray(t), jax.random.key(1)
    network = jax.jit(apply_fn)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((apply_fn(params, x, times, key) - x) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss))
    step = make_train_step(apply_fn, model.schedule, train)
    batch = {"image": jnp.asarray(np.uint8((image + 1) * 127.5)), "label": jnp.zeros(len(t), int)}
    state = init_state(params, train)

    def update() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return jax.block_until_ready(metrics)

    return {
        FORWARD: lambda: network(params, x, times).block_until_ready(),
        BACKWARD: lambda: jax.block_until_ready(gradient(params)),
        STEP: update,
    }


def their_sides(
    folder: str, train: TrainConfig, image: np.ndarray, t: np.ndarray, dtype: str,
    wrap: Callable[[Any], Any] = lambda network: network,
) -> Sides:  # fmt: skip
    """As `our_sides`."""
    import torch
    from diffusers import UNet2DModel
    from torch.nn import functional as F

    place = peers.place()
    layout = {"memory_format": torch.channels_last}
    model = UNet2DModel.from_pretrained(folder, subfolder="unet").to(place["device"], **layout)
    network, parameters = wrap(model), list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    x = torch.from_numpy(image).permute(0, 3, 1, 2).to(**place).contiguous(**layout)
    index = torch.from_numpy(t - 1).to(place["device"])
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0).to(**place)
    betas = (train.adam_b1, train.adam_b2)
    optimizer = torch.optim.Adam(parameters, train.learning_rate, betas, train.adam_eps, fused=True)

    def denoise(x: Any, index: Any) -> Any:
        with torch.autocast(place["device"], torch.bfloat16, enabled=dtype == "bfloat16"):
            return network(x, index).sample.float()

    def forward() -> Any:
        model.eval()
        with torch.inference_mode():
            out = denoise(x, index)
        peers.wait()
        return out.permute(0, 2, 3, 1).cpu()

    def backward() -> Any:
        model.train()
        optimizer.zero_grad()
        loss = F.mse_loss(denoise(x, index), x)
        loss.backward()
        peers.wait()
        return loss.item()

    def step() -> Any:
        model.train()
        index = torch.randint(0, T, (len(x),), device=place["device"])
        noise = torch.randn_like(x)
        a = alpha_bar[index][:, None, None, None]
        optimizer.zero_grad()
        loss = F.mse_loss(denoise(a.sqrt() * x + (1 - a).sqrt() * noise, index), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - train.ema_decay)
        peers.wait()
        return loss.item()

    return {FORWARD: forward, BACKWARD: backward, STEP: step}


def all_sides(
    folder: str, batch: int, args: argparse.Namespace, only: Sequence[str] | None
) -> tuple[dict[str, Sides], dict[str, str]]:
    """Name → its three calls, and name → why it does not run."""
    image, t = inputs(batch, args)
    train = TrainConfig(batch_size=batch, warmup_steps=0)
    model = peers.load_ours(folder, args.dtype)
    absent: dict[str, str] = {}
    sides = {OURS: lambda: our_sides(model, train, image, t)}
    if reason := peers.missing("torch", "diffusers"):
        absent = dict.fromkeys((EAGER, COMPILED), reason)
    else:
        import torch

        torch._dynamo.reset()
        theirs = partial(their_sides, folder, train, image, t, args.dtype)
        compiler = partial(torch.compile, mode=args.compile_mode, dynamic=False)
        sides |= {EAGER: theirs, COMPILED: lambda: theirs(compiler)}
        if not args.on_gpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            del sides[COMPILED]
            absent[COMPILED] = "no C++ compiler"
    return {n: make() for n, make in sides.items() if only is None or n in only}, absent


def measure(args: argparse.Namespace, folder: str, batch: int, flops: float) -> dict[str, Any]:
    """Three tables at one batch."""
    sides, absent = all_sides(folder, batch, args, args.only and [OURS, *args.only])
    tables = {}
    for table, passes in WORK.items():
        calls = {name: side[table] for name, side in sides.items()}
        found = peers.race(calls, args.rounds, batch, passes * flops * batch)
        first = found.pop("first")
        for name, row in found["sides"].items():
            if table == FORWARD and name != OURS:
                a, b = (np.asarray(first[n], np.float64) for n in (OURS, name))
                row["disagreement"] = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)))
            if table == STEP and not args.no_memory:
                module = "experiments.benchmarks.training"
                row["memory_mb"] = peers.memory_of(module, name, folder, batch, args)
        tables[table] = found | {"not run": absent}
        peers.show(f"{table}, batch {batch}", tables[table])
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and prints; with --json writes."""
    args = peers.arguments(__doc__, argv, (EAGER, COMPILED))
    if args.memory_of:
        side, folder = args.memory_of

        def make() -> Call:
            return all_sides(folder, args.batch[0], args, [side])[0][side][STEP]

        peers.measure_memory(side, make)
        return
    peers.benchmark("training", args, partial(measure, args))


if __name__ == "__main__":
    main()
