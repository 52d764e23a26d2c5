"""What the training loop costs: `fit` against a step written by hand, checkpoints, and the input.

    python -m experiments.benchmarks.train_loop [--preset mnist] [--steps 100] [--rounds 3]

All in one run, in turns, so that what else the machine does falls on both. Measured, in parts of
`--every` steps each, between the lines of a run's metrics:

- the speed of `fit`'s steps over that of the same step written by hand with optax, jitted, in a
  bare loop on one batch that stays on the device: no input, no log, no checkpoint, no signals;
- the same where a run is resumed;
- what a checkpoint adds, in seconds;
- FLOP/s and MFU as the log has them, over those counted by hand (`peers.network_flops`);
- images/s of the input pipeline alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddim_jax.data import batches, load
from ddim_jax.networks.unet import build
from ddim_jax.storage.files import portable
from ddim_jax.training import feeding, parallel
from ddim_jax.training.loop import fit
from ddim_jax.training.presets import PRESETS
from experiments.benchmarks import peers

NEVER = 10**9


@dataclasses.dataclass
class Settings:
    """What is measured; the rest is the preset's."""

    preset: str = "digits"
    batch_size: int | None = None
    dtype: str | None = None
    steps: int = 100  # measured ones
    every: int = 20  # steps in a line of metrics; as many are made before the clock starts
    rounds: int = 3
    data: str | None = None  # in place of the preset's
    data_dir: str | None = None
    input_seconds: float = 5.0  # to watch the input alone


def by_hand(apply_fn: Any, alpha_bar: np.ndarray, config: Any) -> tuple[Any, Any]:
    """The step as one would write it for oneself, and its optimiser."""
    optimizer = optax.chain(optax.clip_by_global_norm(config.grad_clip),
                            optax.adam(config.learning_rate))  # fmt: skip
    root, rest = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    root, rest = jnp.asarray(root, jnp.float32), jnp.asarray(rest, jnp.float32)

    def step(params, ema, opt_state, key, images, **labels):
        x_0 = images.astype(jnp.float32) / 127.5 - 1
        t_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = jax.random.randint(t_key, x_0.shape[:1], 1, len(alpha_bar))
        noise = jax.random.normal(noise_key, x_0.shape)
        x_t = root[t][:, None, None, None] * x_0 + rest[t][:, None, None, None] * noise

        def loss(params):
            return ((apply_fn(params, x_t, t, dropout_key, **labels) - noise) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: e + (1 - config.ema_decay) * (p - e), ema, params)
        return params, ema, opt_state, value

    return optimizer, jax.jit(step, donate_argnums=(0, 1, 2))


class Loop:
    """The network, the data and the two ways to train."""

    def __init__(self, settings: Settings):
        self.settings, preset = settings, PRESETS[settings.preset]()
        named = preset.data if settings.data is None else type(preset.data)(settings.data)
        digits = settings.preset == "digits" and settings.data is None
        self.dataset = load("digits") if digits else named.load(settings.data_dir)
        self.network = dataclasses.replace(preset.model, dtype=settings.dtype or preset.model.dtype)
        self.apply_fn, self.params = build(self.network, jax.random.key(0))
        self.schedule = preset.schedule.build()
        self.config = dataclasses.replace(
            preset.train,
            batch_size=settings.batch_size or preset.train.batch_size,
            num_updates=settings.steps + settings.every,
            log_every=settings.every,
            checkpoint_every=NEVER,
            sample_every=0,
            prediction="eps",
            gamma="one",
            cosine_decay=False,
            flip=False,
        )
        alpha_bar = np.asarray(self.schedule.alpha_bar)
        self.optimizer, self.step = by_hand(self.apply_fn, alpha_bar, self.config)
        self.batch = next(batches(self.dataset, self.config.batch_size, 0))

    def hand(self, steps: int | None = None) -> list[float]:
        """Seconds a step, by hand, of each part but the first."""
        own = (jax.tree.map(jnp.array, self.params), jax.tree.map(jnp.array, self.params),
               self.optimizer.init(self.params))  # fmt: skip
        images, key = jax.device_put(self.batch["image"]), jax.random.key(0)
        labels = {} if self.network.num_classes is None else {"labels": self.batch["label"]}
        ends, value = [], None
        for n in range(steps or self.config.num_updates):
            *own, new = self.step(*own, jax.random.fold_in(key, n), images, **labels)
            if n and n % self.settings.every == 0:
                value.block_until_ready()  # the one before: this one keeps the device busy
                ends.append(time.perf_counter())
            value = new
        value.block_until_ready()
        ends.append(time.perf_counter())
        return list(np.diff(ends) / self.settings.every)

    def fit(self, folder: str, updates: int, way: str = "never", save: int = NEVER) -> None:
        """One run."""
        config = dataclasses.replace(self.config, num_updates=updates, checkpoint_every=save)
        fit(
            self.apply_fn, self.params, self.schedule, self.dataset, config, folder, resume=way,
            num_classes=self.network.num_classes, progress=False, say=lambda text: None,
        )  # fmt: skip

    def lines(self, folder: str, start: int = 0) -> tuple[list[float], dict[str, float]]:
        """Seconds a step of each part of a run but the first after `start`, and its last line."""
        text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
        found = [line for line in map(json.loads, text.splitlines()) if line["step"] > start]
        return list(np.diff([v["seconds"] for v in found]) / self.settings.every), found[-1]

    def round(self) -> dict[str, Any]:
        """One turn of each."""
        total, every = self.config.num_updates, self.settings.every
        hand = self.hand()
        with tempfile.TemporaryDirectory() as parent:
            fresh, saving = f"{parent}/fresh", f"{parent}/saving"
            self.fit(fresh, total)
            made, last = self.lines(fresh)
            self.fit(fresh, 2 * total, "must")
            resumed = self.lines(fresh, total)[0]
            self.fit(saving, total, save=2 * every)
            saved = self.lines(saving)[0]
        return {"hand": hand, "fit": made, "resumed": resumed, "saving": saved, "last": last}

    def input_alone(self) -> dict[str, Any]:
        """Images/s of what the host does in `fit`: read and decode, or indices alone."""
        resident = feeding.on_device(self.dataset, self.config)
        threads = self.config.num_threads
        stream = batches(self.dataset, self.config.batch_size, 0, num_threads=threads,
                         indices_only=resident)  # fmt: skip
        next(stream)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < self.settings.input_seconds:
            next(stream)
            count += self.config.batch_size
        rate = count / (time.perf_counter() - began)
        return {"images_per_second": rate, "data_on_device": resident}


def prepare(settings: Settings) -> Callable[[], dict[str, Any]]:
    """Compiles, and gives what measures."""
    loop = Loop(settings)
    loop.hand(settings.every)
    if jax.config.jax_compilation_cache_dir:  # each `fit` compiles anew, or reads it there
        with tempfile.TemporaryDirectory() as parent:
            loop.fit(f"{parent}/run", settings.every)
    return lambda: figures(loop)


def figures(loop: Loop) -> dict[str, Any]:
    """All that is measured."""
    if not jax.config.jax_compilation_cache_dir:
        loop.round()
    rounds = [loop.round() for _ in range(loop.settings.rounds)]
    parts = {k: [v for r in rounds for v in r[k]] for k in ("hand", "fit", "resumed", "saving")}

    def ratio(over: str, under: str) -> dict[str, float]:
        return peers.spread([a / b for a, b in zip(parts[over], parts[under])])

    checkpoints = max(1, -(-loop.config.num_updates // (2 * loop.settings.every)) - 1)
    extra = [(sum(r["saving"]) - sum(r["fit"])) * loop.settings.every for r in rounds]
    flops, last = 3 * peers.network_flops(loop.network), rounds[-1]["last"]
    by_hand = last["images_per_second"] * flops
    peak = parallel.peak_flops(jax.devices()[0].device_kind)
    settings = dataclasses.asdict(loop.settings) | {"batch_size": loop.config.batch_size}
    del settings["data_dir"]  # where it lies on this machine
    return {
        "settings": settings | {"data": portable(settings["data"] or loop.dataset.name)},
        "seconds": {k: peers.spread(v) for k, v in parts.items()},
        "speed_over_hand": ratio("hand", "fit"),
        "resumed_over_fresh": ratio("fit", "resumed"),
        "seconds_a_checkpoint": peers.spread([e / checkpoints for e in extra]),
        "logged": {k: last.get(k) for k in ("images_per_second", "flops_per_second", "mfu")},
        "counted": {"flops_per_second": by_hand, "mfu": peak and by_hand / peak},
        "input": loop.input_alone(),
        "rounds": rounds,
    }


def show(found: dict[str, Any]) -> str:
    """One table as Markdown."""
    settings, logged, counted = found["settings"], found["logged"], found["counted"]
    rows, fed, rate = [], found["input"], logged["images_per_second"]

    def row(name: str, values: dict[str, float], scale: float = 1.0) -> None:
        low, middle, high = (f"{scale * values[k]:.3f}" for k in ("least", "median", "most"))
        rows.append(f"| {name} | {middle} | {low} to {high} |")

    for name, key in (("by hand", "hand"), ("`fit`", "fit"), ("`fit`, resumed", "resumed")):
        row(f"{name}, ms a step", found["seconds"][key], 1e3)
    row("speed of `fit` / by hand", found["speed_over_hand"])
    row("resumed / fresh", found["resumed_over_fresh"])
    row("seconds that a checkpoint adds", found["seconds_a_checkpoint"])
    of = logged["flops_per_second"] / counted["flops_per_second"]
    what = "indices of images on the device" if fed["data_on_device"] else "images"
    rows += [
        f"| images/s in the log | {rate:.0f} | |",
        f"| FLOP/s in the log / counted by hand | {of:.4f} | |",
        "| MFU in the log; by hand | "
        + (f"{logged['mfu']:.4f}; {counted['mfu']:.4f}" if counted["mfu"] else "no peak is known")
        + " | |",
        f"| input alone ({what}), images/s | {fed['images_per_second']:.0f} | |",
    ]
    title = f"`fit`, {settings['preset']}, batch {settings['batch_size']}"
    return "\n".join([f"| {title} | median | extremes |", "|---|---|---|", *rows])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="digits", choices=PRESETS)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    for name in ("steps", "every", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--data-dir")
    settings = Settings(**vars(parser.parse_args()))
    if settings.steps % settings.every or settings.steps < settings.every:
        parser.error("--steps must be a multiple of --every")
    print(show(prepare(settings)()))
    print(f"\n{len(jax.devices())} × {jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
