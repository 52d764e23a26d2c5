"""What the training loop costs: `fit` against a step written by hand, checkpoints, and the input.

    python -m experiments.benchmarks.train_loop [--preset mnist] [--steps 30] [--rounds 3]

All in one run, in turns, so that what else the machine does falls on both. Printed:

- the speed of `fit`'s steps over that of the same step written by hand with optax, jitted, in a
  bare loop on one batch that stays on the device: no input, no log, no checkpoint, no signals;
- the same where a run is resumed in its middle;
- the time of `fit` with a checkpoint every `--checkpoint-every` steps over that without;
- images/s of the input pipeline alone, over those of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddim_jax.data import batches, load
from ddim_jax.networks.unet import build
from ddim_jax.training.loop import fit
from ddim_jax.training.presets import PRESETS

WARM = 20  # steps before the clock starts, and the most in a line of metrics


def by_hand(apply_fn, alpha_bar, config):
    """The step as one would write it for oneself."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits", choices=PRESETS)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    args = parser.parse_args()
    preset = PRESETS[args.preset]()
    dataset = preset.data.load() if args.preset != "digits" else load("digits")
    dataset.take(np.arange(min(len(dataset), 5000)))  # decoded once, as in all epochs but the first
    network = dataclasses.replace(preset.model, dtype=args.dtype or preset.model.dtype)
    apply_fn, params = build(network, jax.random.key(0))
    schedule = preset.schedule.build()
    config = dataclasses.replace(
        preset.train,
        batch_size=args.batch_size or preset.train.batch_size,
        num_updates=args.steps + WARM,
        log_every=WARM,
        checkpoint_every=10**9,
        sample_every=0,
        cosine_decay=False,
        flip=False,
    )
    optimizer, step = by_hand(apply_fn, np.asarray(schedule.alpha_bar), config)
    batch = next(batches(dataset, config.batch_size, 0))
    labels = {} if network.num_classes is None else {"labels": batch["label"]}

    def hand() -> float:
        state = (jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params),
                 optimizer.init(params))  # fmt: skip
        images, key = jax.device_put(batch["image"]), jax.random.key(0)
        for n in range(args.steps + WARM):
            *state, value = step(*state, jax.random.fold_in(key, n), images, **labels)
            if n == WARM - 1:
                value.block_until_ready()
                began = time.perf_counter()
        value.block_until_ready()
        return (time.perf_counter() - began) / args.steps

    def ours(checkpoint_every: int = 10**9, resume: bool = False) -> float:
        seconds = {}

        def run(updates: int, way: str = "never") -> None:
            own = dataclasses.replace(
                config, checkpoint_every=checkpoint_every, num_updates=updates
            )
            fit(
                apply_fn,
                params,
                schedule,
                dataset,
                own,
                folder + "/run",
                resume=way,
                num_classes=network.num_classes,
                progress=False,
                say=lambda text: None,
                on_log=lambda state, line: seconds.update({line["step"]: line["seconds"]}),
            )

        with tempfile.TemporaryDirectory() as folder:
            if resume:
                run(WARM)
            before = WARM * resume
            run(before + args.steps + WARM, "must" if resume else "never")
        return (seconds[before + args.steps + WARM] - seconds[before + WARM]) / args.steps

    rows = []
    for _ in range(args.rounds + 1):
        rows.append((hand(), ours(), ours(args.checkpoint_every), ours(resume=True)))
        print("  ".join(f"{1e3 * v:.1f} ms" for v in rows[-1]), flush=True)
    rows = rows[1:]  # the first round compiles
    loop = statistics.median(h / o for h, o, *_ in rows)
    saving = statistics.median(s / o for _, o, s, _ in rows)
    resumed = statistics.median(o / r for _, o, _, r in rows)

    iterator = batches(dataset, config.batch_size, 0, num_threads=config.num_threads)
    next(iterator)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 5:
        next(iterator)
        count += config.batch_size
    fed = count / (time.perf_counter() - began)
    rate = config.batch_size / statistics.median(o for _, o, *_ in rows)
    print(f"""
{args.preset}, batch {config.batch_size}, {args.steps} steps, {args.rounds} rounds, {len(jax.devices())} × {jax.devices()[0].device_kind}, jax {jax.__version__}
| figure | median | rounds |
|---|---|---|
| speed of fit / by hand | {loop:.3f} | {", ".join(f"{h / o:.3f}" for h, o, *_ in rows)} |
| speed of a resumed run / a fresh one | {resumed:.3f} | {", ".join(f"{o / r:.3f}" for _, o, _, r in rows)} |
| with a checkpoint every {args.checkpoint_every} / without | {saving:.3f} | {", ".join(f"{s / o:.3f}" for _, o, s, _ in rows)} |
| training, images/s | {rate:.0f} | |
| input alone, images/s | {fed:.0f} | {fed / rate:.0f}× training |""")  # noqa: E501


if __name__ == "__main__":
    main()
