"""Training beside PyTorch: the same U-Net, weights, batch and optimiser.

Forward (no dropout), forward + backward, and the whole step: noise, loss, gradients, clipping,
Adam and moving average. Ours is `make_train_step`; theirs diffusers' `UNet2DModel` with PyTorch's
fused Adam, eager and through `torch.compile`, channels last; bfloat16 by autocast, with weights in
float32 as ours. Operations are counted once forward and twice backward.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import init_state, make_train_step
from experiments.benchmarks import peers
from experiments.benchmarks.peers import Call

FORWARD, BACKWARD, STEP = "forward", "forward + backward", "train step"
WORK = {FORWARD: 1, BACKWARD: 3, STEP: 3}  # in forward passes
T = 1000


def side(spec: dict[str, Any]) -> Call:
    """A call of `spec["repeats"]` passes, one after the other, that waits for the last alone."""
    make = _ours if peers.is_ours(spec["side"]) else _theirs
    once, wait = make(spec, TrainConfig(batch_size=spec["batch"], warmup_steps=0))

    def many() -> Any:
        for _ in range(spec["repeats"]):
            result = once()
        wait(result)
        return result

    return many


def inputs(batch: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, C) in [−1, 1] and times (B,) in 1..T."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (batch, *shape)).astype(np.float32)
    return images, rng.integers(1, T + 1, batch)


def _ours(spec: dict[str, Any], train: TrainConfig) -> tuple[Call, Any]:
    """One pass, and what waits for its result."""
    model = ddim.load_model(spec["folder"], dtype=spec["dtype"])
    image, t = inputs(spec["batch"], model.image_shape)
    apply_fn, params = model.apply_fn, model.params
    x, times, key = jnp.asarray(image), jnp.asarray(t), jax.random.key(1)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((apply_fn(params, x, times, key) - x) ** 2)

    if spec["what"] == FORWARD:
        network = jax.jit(apply_fn)
        return lambda: network(params, x, times), jax.block_until_ready
    if spec["what"] == BACKWARD:
        gradient = jax.jit(jax.value_and_grad(loss))
        return lambda: gradient(params), jax.block_until_ready
    step = make_train_step(apply_fn, model.schedule, train)
    batch = {"image": jnp.asarray(np.uint8((image + 1) * 127.5)), "label": jnp.zeros(len(t), int)}
    state = init_state(params, train)

    def update() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return update, jax.block_until_ready


def _theirs(spec: dict[str, Any], train: TrainConfig) -> tuple[Call, Any]:
    """As `_ours`."""
    import torch
    from diffusers import UNet2DModel
    from torch.nn import functional as F

    place = peers.place()
    layout = {"memory_format": torch.channels_last}
    model = UNet2DModel.from_pretrained(spec["folder"], subfolder="unet")
    model = model.to(place["device"], **layout)
    network, parameters = peers.wrapped(spec["side"], model), list(model.parameters())
    size = model.config.sample_size
    image, t = inputs(spec["batch"], (size, size, model.config.in_channels))
    x = torch.from_numpy(image).permute(0, 3, 1, 2).to(**place).contiguous(**layout)
    fixed = torch.from_numpy(t - 1).to(place["device"])
    autocast = {"dtype": torch.bfloat16, "enabled": spec["dtype"] == "bfloat16"}

    def denoise(x: Any, index: Any) -> Any:
        with torch.autocast(place["device"], **autocast):
            return network(x, index).sample.float()

    @torch.inference_mode()
    def forward() -> Any:
        return denoise(x, fixed).permute(0, 2, 3, 1)

    def backward() -> Any:
        for p in parameters:
            p.grad = None
        loss = F.mse_loss(denoise(x, fixed), x)
        loss.backward()
        return loss.detach()

    step = _their_step(denoise, parameters, x, train) if spec["what"] == STEP else None
    model.train(spec["what"] != FORWARD)
    calls = {FORWARD: forward, BACKWARD: backward, STEP: step}
    return calls[spec["what"]], lambda result: peers.wait()


def _their_step(denoise: Any, parameters: list[Any], x: Any, train: TrainConfig) -> Call:
    """Noise, loss, gradients, clipping, Adam and moving average."""
    import torch
    from torch.nn import functional as F

    place = {"device": x.device}
    ema = [p.detach().clone() for p in parameters]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).to(x)
    betas = (train.adam_b1, train.adam_b2)
    optimizer = torch.optim.Adam(parameters, train.learning_rate, betas, train.adam_eps, fused=True)

    def step() -> Any:
        index = torch.randint(0, T, (len(x),), **place)
        noise = torch.randn_like(x)
        a = alpha_bar[index][:, None, None, None]
        optimizer.zero_grad()
        loss = F.mse_loss(denoise(a.sqrt() * x + (1 - a).sqrt() * noise, index), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - train.ema_decay)
        return loss.detach()

    return step
