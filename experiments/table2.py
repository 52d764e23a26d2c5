"""Table 2: the error of encoding images and decoding them again, against S.

    python -m experiments.table2 [--model digits] [--out results/table2] [--full]

Mean squared error per dimension with pixels in [0, 1]: for the plain encoder with ε at the target
and at the source of each step, and for the exact inverse at the S of --exact-steps. The images are
the test split where the data have one; with --or-not-run, where no data are at hand, images that
the model draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import Dataset
from ddim_jax.pictures.images import to_model
from experiments import drawing, pipeline
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment, sizes

SMALL = {
    "steps": [10, 20, 50, 100, 200, 500, 1000],
    "num_images": ["48", "500=8", "1000=8"],
    "exact_steps": [10, 20],
    "exact_samples": 16,
    "max_iterations": 100,
    "reach_steps": [10],
    "reach_samples": 16,
}
FULL = {
    "num_images": ["10000"],
    "exact_steps": [10, 20, 50, 100],
    "exact_samples": 1000,
    "max_iterations": 200,
    "reach_samples": 1000,
}
TOLERANCE = 1e-4  # the default of `ddim_jax.invert`
HELP = {
    "exact_steps": "S at which the exact inverse is found as well; 0 for none",
    "exact_samples": "images for the exact inverse",
    "reach_steps": "S at which the error is also told for each t that the encoding ends at",
    "reach_samples": "images for that; 0 among --reach-steps for none",
    "max_iterations": "network calls that one of its steps may take",
}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Encodes, decodes and compares."""
    args = parse(
        "table2", __doc__.splitlines()[0], argv, SMALL, FULL, without=["extractor"], **HELP
    )
    experiment = Experiment("table2", args)
    if experiment.data_config.name != "digits":  # which have no other split
        experiment.data_config = dataclasses.replace(experiment.data_config, split="test")
    most = max(
        args.exact_samples, args.reach_samples, *(experiment.num_images(s) for s in args.steps)
    )
    if args.or_not_run and not experiment.at_hand:
        experiment.dataset = own_images(experiment, most)
    if most > len(experiment.dataset):
        name = experiment.dataset.name
        raise ValueError(f"{name} has {len(experiment.dataset)} images, {most} were asked for")
    if args.exact_samples < 2:
        raise ValueError("--exact-samples must be at least 2, for a standard error, got 1")
    for s in filter(None, [*args.exact_steps, *args.reach_steps]):
        experiment.tau(s)
    experiment.begin_with_model()
    order = np.random.default_rng(args.seed).permutation(len(experiment.dataset))[:most]
    of: dict[str, Any] = {}
    for s in args.steps:
        of[f"plain-S{s}"] = s, plain, order[: experiment.num_images(s)]
    for s in filter(None, args.reach_steps):
        of[f"reach-S{s}"] = s, reach, order[: args.reach_samples]
    for s in filter(None, args.exact_steps):
        of[f"exact-S{s}"] = s, exact, order[: args.exact_samples]
    jobs = {key: (partial(compute, experiment, s, chosen), Cell)
            for key, (s, compute, chosen) in of.items()}  # fmt: skip
    found = pipeline.cells(experiment, jobs)
    cells, reached, inverses = (
        [{"S": of[k][0], **cell} for k, cell in found.items() if k.startswith(kind)]
        for kind in ("plain", "reach", "exact")
    )
    if not cells:
        raise pipeline.OutOfTimeError("no cell was finished; the same command goes on")
    series = {
        "plain, ε at the target": [[c[k] for c in cells] for k in ("S", "error", "se")],
        "plain, ε at the source": [
            [c[k] for c in cells] for k in ("S", "source_error", "source_se")
        ],
    }
    if inverses:
        label = "exact inverse, all images"
        series[label] = [[c[k] for c in inverses] for k in ("S", "error", "se")]
    figure = drawing.lines(
        {k: (v[0], v[1], v[2]) for k, v in series.items()},
        "steps S (each way)",
        "mean squared error, pixels in [0, 1]",
    )
    counts = {s: experiment.num_images(s) for s in args.steps}
    caption = (
        f"Error per dimension after encoding and decoding images of {experiment.dataset.name} "
        f"({experiment.dataset.split}; {sizes(counts)}; exact inverse: {args.exact_samples:,}), "
        f"{experiment.spacing} τ; bars are one standard error over images."
    )
    missing = [key for key in of if key not in found]
    return experiment.finish(cells, figure, caption, exact=inverses, reach=reached, missing=missing)


def plain(experiment: Experiment, steps: int, chosen: np.ndarray) -> Cell:
    """Encode and decode with the plain encoder, ε at the target and at the source."""
    found: Cell = {}
    for where, prefix in (("target", ""), ("source", "source_")):
        parts = [errors(experiment, x, experiment.tau(steps), where)
                 for x in _batches(experiment, chosen)]  # fmt: skip
        error = np.concatenate(jax.device_get(parts))[: len(chosen)]
        found[prefix + "error"], found[prefix + "se"] = mean_se(error)
    return found | {"num_images": len(chosen), "network_calls": len(experiment.tau(steps))}


def reach(experiment: Experiment, steps: int, chosen: np.ndarray) -> Cell:
    """The error of encoding no farther than each t of τ, and decoding from there: which step errs.

    The last of these is `plain`; the difference of neighbours is what one more step costs.
    """
    tau = experiment.tau(steps)
    found: Cell = {"t": tau.tolist(), "num_images": len(chosen)}
    for where in ("target", "source"):
        rows = []
        for i in range(1, len(tau) + 1):
            parts = [errors(experiment, x, tau[:i], where) for x in _batches(experiment, chosen)]
            rows.append(mean_se(np.concatenate(jax.device_get(parts))[: len(chosen)]))
        found[where], found[f"{where}_se"] = zip(*rows, strict=True)
    return found


def errors(experiment: Experiment, x_0: jax.Array, tau: np.ndarray, eps_at: str) -> jax.Array:
    """(n,) errors of images encoded and decoded along τ, not waited for."""
    pipeline.check_time(experiment)
    schedule, stepper = experiment.model.schedule, experiment.stepper
    x_T = stepper.run(x_0, ddim.encoder(eps_at)(schedule, tau))
    return ddim.reconstruction_error(x_0, stepper.run(x_T, ddim.ddim()(schedule, tau)))


def exact(experiment: Experiment, steps: int, chosen: np.ndarray) -> Cell:
    """Encode by the exact inverse of the sampler, and decode."""
    tau, stepper = experiment.tau(steps), experiment.stepper
    plan, most = ddim.ddim()(experiment.model.schedule, tau), experiment.args.max_iterations
    parts, calls = [], []
    for x_0 in _batches(experiment, chosen):
        pipeline.check_time(experiment)
        x_T, count = stepper.invert(x_0, tau, most)
        off = (stepper.run(x_T, plan) - x_0).reshape(len(x_0), -1)
        parts.append((jnp.square(off / 2).mean(axis=1), jnp.abs(off).max(axis=1)))
        calls.append(count)
    error, residual = (np.concatenate(v)[: len(chosen)] for v in zip(*jax.device_get(parts)))
    converged = residual <= TOLERANCE
    mean, se = mean_se(error)
    return {
        "error": mean,
        "se": se,
        "median_error": float(np.median(error)),
        "converged": float(converged.mean()),
        "converged_error": float(error[converged].mean()) if converged.any() else None,
        "median_residual": float(np.median(residual)),
        "largest_residual": float(residual.max()),
        "network_calls_per_step": float(np.mean([c.mean() for c in jax.device_get(calls)])),
        "num_images": len(chosen),
    }


def mean_se(x: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    x = np.asarray(x, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))


def _batches(experiment: Experiment, chosen: np.ndarray) -> list[jax.Array]:
    """Of one size, and so of one program; the last is filled up with its own first images."""
    devices = len(jax.local_devices())
    size = min(experiment.args.batch_size, -(-len(chosen) // devices)) * devices
    full = np.resize(chosen, -(-len(chosen) // size) * size)
    return [to_model(experiment.dataset.take(some)["image"]) for some in full.reshape(-1, size)]


def own_images(experiment: Experiment, number: int) -> Dataset:
    """What the model draws in 50 steps, η = 0, to be encoded where no data are at hand."""
    plan = ddim.ddim()(experiment.model.schedule, experiment.tau(50))
    devices = len(jax.local_devices())
    size = min(experiment.args.batch_size, -(-number // devices)) * devices
    parts = [experiment.stepper.draw(plan, experiment.args.seed + 1, first, size, False)[0]
             for first in range(0, number, size)]  # fmt: skip
    images = np.concatenate(jax.device_get(parts))[:number]
    name = "the model itself, as no data are at hand"
    facts = {"name": name, "steps": 50}
    shape = experiment.model.image_shape
    unlabelled = np.full(number, -1, np.int32)
    return Dataset(name, "drawn", number, shape, None, facts, lambda i: (images[i], unlabelled[i]))


if __name__ == "__main__":
    run(main)
