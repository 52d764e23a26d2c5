"""Time to one image: `parallel_sample` beside `sample`, in one run, for each η and window.

    python -m experiments.benchmarks.parallel --model FILE [--steps 100] [--batch 1]
        [--eta 0 0.5 1] [--window 16 32 64 100] [--tolerance 0.01] [--repeats 10]
        [--dtype bfloat16] [--json FILE]

All take turns, as in the other benchmarks. "sample / parallel" is the median over the repeats, with
the smallest and largest: above 1, parallel is faster. "differs" is the RMS of the difference over
that of the images, the worst of the batch. A call of the network at batch × window images over one
at batch says what a round costs, and S over rounds what it may: parallel wins where the first is
the smaller one. Networks of 16 bits round anew at every round: below a tolerance of about 1e-2 for
bfloat16 rounds are wasted on that (digits, S = 50, η = 0: 9 at 1e-2, 17 at 3e-3, 27 at 1e-3).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from experiments.arguments import run
from experiments.benchmarks.peers import seconds, spread
from experiments.provenance import device, digest, versions, write_json


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="digits", help="what `ddim_jax.load_model` takes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--window", type=int, nargs="+", default=[16, 32, 64, 100])
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="the network computes in")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this new file too")
    args = parser.parse_args(argv)
    if least := [n for n in ("steps", "batch", "repeats") if getattr(args, n) < 1]:
        parser.error(f"--{least[0]} must be at least 1")
    if min(args.window) < 1:
        parser.error("--window must be at least 1")
    if args.json and args.json.exists():
        parser.error(f"{args.json} exists; choose another --json")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"there is no folder {args.json.parent} for --json; make it first")
    return args


def load(source: str, dtype: str | None) -> ddim.Model:
    """The model, computing in dtype."""
    model = ddim.load_model(source)
    if dtype in (None, model.config.dtype):
        return model
    return ddim.load_model(source, config=dataclasses.replace(model.config, dtype=dtype))


def sampler(model: ddim.Model, tau: Any, window: int, tolerance: float) -> Callable[..., Any]:
    """`parallel_sample` of a model, jitted as `make_sampler` is: (plan, x_T, key)."""

    @jax.jit
    def draw(params: Any, plan: ddim.Plan, x_T: Any, key: Any, tolerance: Any) -> Any:
        return ddim.parallel_sample(
            partial(model.apply_fn, params), x_T, model.schedule, tau, key=key,
            method=lambda *_: plan, window=window, tolerance=tolerance,
        )  # fmt: skip

    return lambda plan, x_T, key: draw(model.params, plan, x_T, key, tolerance)


def measure(args: argparse.Namespace, model: ddim.Model) -> dict[str, Any]:
    """η → window → figures."""
    tau = ddim.timesteps(model.schedule.num_steps, args.steps)
    x_T = ddim.initial_noise(jax.random.key(0), args.batch, model.image_shape)
    in_turn, key = ddim.make_sampler(model, tau), jax.random.key(1)
    windows = sorted({min(window, args.steps) for window in args.window})
    parallel = {w: sampler(model, tau, w, args.tolerance) for w in windows}
    calls = {n: network(model, n * args.batch) for n in (1, *windows)}
    found: dict[str, Any] = {}
    for eta in args.eta:
        plan, noise = ddim.ddim(eta)(model.schedule, tau), key if eta else None
        sides: dict[Any, Callable[[], Any]] = {
            "sample": lambda eta=eta, noise=noise: in_turn(x_T, noise, eta=eta).block_until_ready()
        } | {
            w: lambda draw=draw, plan=plan, noise=noise: jax.block_until_ready(
                draw(plan, x_T, noise)
            )
            for w, draw in parallel.items()
        }
        first = {name: side() for name, side in sides.items()}
        times = [{n: seconds(side) for n, side in sides.items()} for _ in range(args.repeats)]
        middle = {name: statistics.median(t[name] for t in times) for name in sides}
        want, rows = np.asarray(first.pop("sample")), {}
        for w, result in first.items():
            rows[w] = {
                "rounds": int(result.rounds),
                "seconds": middle[w],
                "sample_over_parallel": spread([t["sample"] / t[w] for t in times]),
                "error": float(result.error.max()),
                "differs": differs(np.asarray(result.x_0), want),
                "network_seconds": calls[w],
            }
        found[f"{eta:g}"] = {"sample_seconds": middle["sample"], "windows": rows}
        show(eta, args, found[f"{eta:g}"], calls[1])
    return found


def network(model: ddim.Model, batch: int) -> float:
    """Seconds of one call: the median of ten."""
    call = jax.jit(model.apply_fn)
    x, t = jnp.zeros((batch, *model.image_shape)), jnp.full(batch, 500)
    side = lambda: call(model.params, x, t).block_until_ready()  # noqa: E731
    side()
    return statistics.median(seconds(side) for _ in range(10))


def differs(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the difference over that of the image, the worst of the batch."""
    rms = lambda x: np.sqrt(np.square(x).reshape(len(x), -1).mean(1))  # noqa: E731
    return float((rms(got - want) / rms(want)).max())


def show(eta: float, args: argparse.Namespace, found: dict[str, Any], call: float) -> None:
    """One table as Markdown."""
    print(f"\nη = {eta:g}, S = {args.steps}, batch {args.batch}, tolerance {args.tolerance:g}: "
          f"`sample` {found['sample_seconds']:.4f} s\n")  # fmt: skip
    print("| window | rounds | s | sample / parallel | differs | call / call of one step |")
    print("|---|---|---|---|---|---|")
    for window, row in found["windows"].items():
        ratio = row["sample_over_parallel"]
        print(
            f"| {window} | {row['rounds']} | {row['seconds']:.4f} | {ratio['median']:.2f} "
            f"({ratio['least']:.2f} to {ratio['most']:.2f}) | {row['differs']:.1e} | "
            f"{row['network_seconds'] / call:.2f} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs and prints; with --json writes."""
    args = parse(argv)
    model = load(args.model, args.dtype)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "model")}
    results = {
        "command": shlex.join(["python", "-m", "experiments.benchmarks.parallel", *sys.argv[1:]]),
        "machine": device() | {"load": os.getloadavg()[0], "versions": versions("flax")},
        "model": digest(model),
        "settings": settings | {"dtype": model.config.dtype},
        "eta": measure(args, model),
    }
    kind = results["machine"]["kind"]
    print(f"\n{kind}, {model.config.dtype}")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    run(main)
