"""The CIFAR-10 train step beside PyTorch's, in one run: same U-Net, weights, batch, optimiser.

    python experiments/benchmarks/train_step.py [--batch 8] [--rounds 7] [--json out.json]

Three rows: forward (no dropout), forward + backward, and the whole step: noise, loss, gradients,
clipping, Adam and moving average. Both sides take turns within each round, so that a busy machine
slows both; the figure is the median over rounds of PyTorch's time / ours (above 1: ours is faster),
with the smallest and largest. GFLOP/s count the network's products, not those with padding, once
forward and twice backward. The last row is what each library's product of 2048×2048 matrices
reaches. The PyTorch network is written here from Ho et al. (2020) and must first give our output
for our weights; without PyTorch its columns are left out. A last table compares `make_train_step`
with the same step written by hand with optax.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddim_jax as ddim
from ddim_jax._unet_config import UNetConfig
from ddim_jax.training import TrainConfig, init_state, make_train_step
from ddim_jax.unet import abstract_params, build

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    torch = None

BETA = (1e-4, 0.02)
T = 1000


# ---- the same network in PyTorch ----

if torch is not None:

    class Resnet(nn.Module):
        def __init__(self, c_in: int, c_out: int, temb: int, dropout: float):
            super().__init__()
            self.dropout = dropout
            self.norm1, self.norm2 = (nn.GroupNorm(32, c, eps=1e-6) for c in (c_in, c_out))
            self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
            self.temb_proj = nn.Linear(temb, c_out)
            self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

        def forward(self, x, temb):
            h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
            h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
            return self.nin_shortcut(x) + self.conv2(h)

    class Attention(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.norm = nn.GroupNorm(32, channels, eps=1e-6)
            self.q, self.k, self.v, self.proj_out = (
                nn.Conv2d(channels, channels, 1) for _ in range(4)
            )

        def forward(self, x):
            y = self.norm(x)
            q, k, v = (f(y).flatten(2).mT for f in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v)
            return x + self.proj_out(out.mT.reshape(x.shape))

    class TorchUNet(nn.Module):
        def __init__(self, config: UNetConfig):
            super().__init__()
            ch, temb = config.channels, 4 * config.channels
            widths = [m * ch for m in config.multipliers]

            def level(inputs, c, resolution, **more):
                attn = inputs if resolution in config.attention_resolutions else []
                return nn.ModuleDict(
                    {
                        "block": nn.ModuleList(
                            Resnet(c_in, c, temb, config.dropout) for c_in in inputs
                        ),
                        "attn": nn.ModuleList(Attention(c) for _ in attn),
                        **{name: nn.ModuleDict({"conv": conv}) for name, conv in more.items()},
                    }
                )

            self.channels = ch
            dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
            self.temb = nn.ModuleDict({"dense": dense})
            self.conv_in = nn.Conv2d(config.in_channels, ch, 3, padding=1)
            skips, down, up, below = [ch], [], [], widths[-1]
            for i, (c, resolution) in enumerate(zip(widths, config.resolutions)):
                inputs = [skips[-1]] + [c] * (config.num_blocks - 1)
                last = i == len(widths) - 1
                more = {} if last else {"downsample": nn.Conv2d(c, c, 3, stride=2)}
                down.append(level(inputs, c, resolution, **more))
                skips += [c] * config.num_blocks + [c] * (not last)
            self.down = nn.ModuleList(down)
            self.mid = nn.ModuleDict(
                {
                    "block_1": Resnet(below, below, temb, config.dropout),
                    "attn_1": Attention(below),
                    "block_2": Resnet(below, below, temb, config.dropout),
                }
            )
            for i in reversed(range(len(widths))):
                c = widths[i]
                inputs = [h + skips.pop() for h in [below] + [c] * config.num_blocks]
                more = {"upsample": nn.Conv2d(c, c, 3, padding=1)} if i else {}
                up.append(level(inputs, c, config.resolutions[i], **more))
                below = c
            self.up = nn.ModuleList(up[::-1])
            self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
            self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

        def forward(self, x, t):
            half = self.channels // 2
            freq = torch.exp(torch.arange(half) * (-np.log(10000.0) / (half - 1)))
            angle = (t - 1).float()[:, None] * freq
            temb = torch.cat([angle.sin(), angle.cos()], 1)
            first, second = self.temb["dense"]
            temb = second(F.silu(first(temb)))

            def run(level, i, h):
                h = level["block"][i](h, temb)
                return level["attn"][i](h) if len(level["attn"]) else h

            skips = [self.conv_in(x)]
            for level in self.down:
                for i in range(len(level["block"])):
                    skips.append(run(level, i, skips[-1]))
                if "downsample" in level:
                    skips.append(level["downsample"]["conv"](F.pad(skips[-1], (0, 1, 0, 1))))
            h = self.mid["attn_1"](self.mid["block_1"](skips[-1], temb))
            h = self.mid["block_2"](h, temb)
            for level in reversed(self.up):
                for i in range(len(level["block"])):
                    h = run(level, i, torch.cat([h, skips.pop()], 1))
                if "upsample" in level:
                    h = level["upsample"]["conv"](F.interpolate(h, scale_factor=2.0))
            return self.conv_out(F.silu(self.norm_out(h)))


def load(model: Any, params: dict[str, Any]) -> None:
    """Our weights into the PyTorch network, name by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ours = {jax.tree_util.keystr(k, simple=True, separator="."): np.asarray(v) for k, v in leaves}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, kind = name.rsplit(".", 1)
            if kind == "weight":
                kind = "kernel" if f"{stem}.kernel" in ours else "scale"
            value = ours.pop(f"{stem}.{kind}")
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            parameter.copy_(torch.from_numpy(value.copy()).reshape(parameter.shape))
    assert not ours, f"not loaded: {sorted(ours)}"


def torch_sides(
    config: UNetConfig, train: TrainConfig, params: dict[str, Any], image: np.ndarray, t: np.ndarray
) -> tuple[dict[str, Callable[[], object]], np.ndarray]:
    """Name -> one timed call, and the output that ours must equal."""
    layout = torch.channels_last
    model = TorchUNet(config).to(memory_format=layout)
    load(model, params)
    alpha_bar = torch.tensor(np.cumprod(1 - np.linspace(*BETA, T)), dtype=torch.float32)
    x = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    times, batch = torch.from_numpy(t), len(t)
    ema = [p.detach().clone() for p in model.parameters()]
    parameters = list(model.parameters())
    betas = (train.adam_b1, train.adam_b2)
    optimizer = torch.optim.Adam(parameters, train.learning_rate, betas, train.adam_eps, fused=True)

    def forward():
        model.eval()
        with torch.inference_mode():
            return model(x, times)

    def backward():
        model.train()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x, times), x)
        loss.backward()
        return loss.item()

    def step():
        model.train()
        index = torch.randint(0, T, (batch,))
        noise = torch.randn_like(x)
        a = alpha_bar[index][:, None, None, None]
        optimizer.zero_grad()
        loss = F.mse_loss(model(a.sqrt() * x + (1 - a).sqrt() * noise, index + 1), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, train.grad_clip, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - train.ema_decay)
        return loss.item()

    sides = {"forward": forward, "forward + backward": backward, "train step": step}
    return sides, forward().permute(0, 2, 3, 1).numpy().copy()


# ---- ours ----


class Stepper:
    """Calls a donating (state, batch) -> (state, metrics), keeping the state."""

    def __init__(self, step: Callable, state: Any, batch: dict[str, jax.Array]):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self) -> object:
        self.state, metrics = self.step(self.state, self.batch)
        return jax.block_until_ready(metrics)


def our_sides(
    apply_fn: Callable, train: TrainConfig, params: dict[str, Any], image: np.ndarray, t: np.ndarray
) -> tuple[dict[str, Callable[[], object]], np.ndarray]:
    """As `torch_sides`."""
    x, times, key = jnp.asarray(image), jnp.asarray(t), jax.random.key(1)
    network = jax.jit(apply_fn)

    def loss(params):
        return jnp.mean((apply_fn(params, x, times, key) - x) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss))
    step = make_train_step(apply_fn, ddim.linear_schedule(T, *BETA), train)
    batch = {
        "image": jnp.asarray(np.uint8((image + 1) * 127.5)),
        "label": jnp.zeros(len(t), jnp.int32),
    }
    sides: dict[str, Callable[[], object]] = {
        "forward": lambda: jax.block_until_ready(network(params, x, times)),
        "forward + backward": lambda: jax.block_until_ready(gradient(params)),
        "train step": Stepper(step, init_state(params, train), batch),
    }
    return sides, np.asarray(network(params, x, times))


def by_hand(apply_fn: Callable, train: TrainConfig, params: Any, batch: Any) -> Stepper:
    """The train step with optax and nothing around it."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.adam(train.learning_rate, train.adam_b1, train.adam_b2, train.adam_eps),
    )
    alpha_bar = jnp.asarray(np.cumprod(1 - np.linspace(*BETA, T)), jnp.float32)

    def step(state, batch):
        count, params, ema, opt_state = state
        x = batch["image"].astype(jnp.float32) / 127.5 - 1
        key = jax.random.fold_in(jax.random.key(train.seed), count)
        t_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = jax.random.randint(t_key, x.shape[:1], 1, T + 1)
        noise = jax.random.normal(noise_key, x.shape)
        a = alpha_bar[t - 1][:, None, None, None]
        x_t = jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise

        def loss(params):
            return jnp.mean((apply_fn(params, x_t, t, dropout_key) - noise) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, ema, 1 - train.ema_decay)
        return (count + 1, params, ema, opt_state), value

    params = jax.tree.map(jnp.copy, params)
    state = (jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    return Stepper(jax.jit(step, donate_argnums=0), state, batch)


# ---- timing ----


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds (rounds, calls); the first call of each is not counted."""
    for call in calls:
        call()
        call()
    return [[seconds(call) for call in calls] for _ in range(rounds)]


def summary(times: list[list[float]]) -> dict[str, float]:
    """Of rounds of (ours, theirs): medians, and of theirs / ours median, smallest and largest."""
    ratios = [theirs / ours for ours, theirs in times]
    ours, theirs = (statistics.median(column) for column in zip(*times))
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


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


def matmul_sides(n: int = 2048) -> tuple[list[Callable[[], object]], float]:
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    dot, ours = jax.jit(jnp.dot), jnp.asarray(a)
    sides: list[Callable[[], object]] = [lambda: dot(ours, ours).block_until_ready()]
    if torch is not None:
        theirs = torch.from_numpy(a)
        sides.append(lambda: theirs @ theirs)
    return sides, 2.0 * n**3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file too")
    args = parser.parse_args()

    config = UNetConfig(dtype=args.dtype)
    train = TrainConfig(batch_size=args.batch, warmup_steps=0)
    apply_fn, params = build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # no layer may be zero, so that the outputs can be compared
        lambda p: p + 0.01 * rng.standard_normal(p.shape).astype(np.float32), params
    )
    image = rng.uniform(-1, 1, (args.batch, 32, 32, 3)).astype(np.float32)
    t = rng.integers(1, T + 1, args.batch)

    ours, out = our_sides(apply_fn, train, params, image, t)
    theirs: dict[str, Callable[[], object]] = {}
    if torch is None:
        print("PyTorch is not installed: its columns are left out.\n")
    else:
        theirs, other = torch_sides(config, train, params, image, t)
        error = float(np.sqrt(np.mean((out - other) ** 2) / np.mean(other**2)))
        print(f"Outputs of the two networks differ by {error:.1e} (RMS, relative).\n")
        assert error < (1e-4 if args.dtype == "float32" else 3e-2)

    flops = network_flops(config) * args.batch
    work = {"forward": flops, "forward + backward": 3 * flops, "train step": 3 * flops}
    results: dict[str, Any] = {}
    print("| batch " + str(args.batch) + " | ours ms/image | images/s | GFLOP/s |", end="")
    print(" PyTorch ms/image | images/s | GFLOP/s | PyTorch's time / ours |" if theirs else "")
    print("|---" * (8 if theirs else 4) + "|")
    for name, call in ours.items():
        row = in_turns([call, theirs.get(name, call)], args.rounds)
        results[name] = s = summary(row)
        columns = [name]
        for side in ("ours", "theirs")[: 2 if theirs else 1]:
            columns += [
                f"{s[side] / args.batch * 1e3:.1f}",
                f"{args.batch / s[side]:.2f}",
                f"{work[name] / s[side] / 1e9:.0f}",
            ]
        if theirs:
            columns.append(f"{s['ratio']:.3f} ({s['least']:.3f} to {s['most']:.3f})")
        print("| " + " | ".join(columns) + " |", flush=True)
    sides, product = matmul_sides()
    medians = [statistics.median(c) for c in zip(*in_turns(sides, 20))]
    rates = [product / m / 1e9 for m in medians]
    results["matrix product GFLOP/s"] = dict(zip(("ours", "theirs"), rates))
    columns = ["matrix product"]
    for rate in rates:
        columns += ["", "", f"{rate:.0f}"]
    print("| " + " | ".join(columns + [""] * bool(theirs)) + " |\n")

    stepper = ours["train step"]
    assert isinstance(stepper, Stepper)
    hand = by_hand(apply_fn, train, params, stepper.batch)
    results["by hand"] = s = summary(in_turns([stepper, hand], args.rounds))
    print("| train step in a bare loop | s/step |\n|---|---|")
    print(f"| make_train_step | {s['ours']:.3f} |\n| by hand with optax | {s['theirs']:.3f} |")
    low, high = 1 / s["most"] - 1, 1 / s["least"] - 1
    print(f"\nOverhead {100 * (1 / s['ratio'] - 1):+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})")

    results["setting"] = {
        "model": dataclasses.asdict(config),
        "batch": args.batch,
        "rounds": args.rounds,
        "flops_per_image_forward": flops / args.batch,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": None if torch is None else torch.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
