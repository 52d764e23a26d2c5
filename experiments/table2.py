"""Table 2: the error of encoding images and decoding them again, against S.

    python -m experiments.table2 [--model digits] [--out results/table2] [--full]

Mean squared error per dimension with pixels in [0, 1]: for the plain encoder with ε at the target
and at the source of each step, and for the exact inverse at the S of --exact-steps. The images are
the test split where the data have one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax.pictures.images import to_model
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment, sizes

SMALL = {
    "steps": [10, 20, 50, 100, 200, 500, 1000],
    "num_images": ["48", "500=8", "1000=8"],
    "exact_steps": [10, 20],
    "exact_samples": 16,
    "max_iterations": 100,
}
FULL = {
    "num_images": ["10000"],
    "exact_steps": [10, 20, 50, 100],
    "exact_samples": 1000,
    "max_iterations": 200,
}
HELP = {
    "exact_steps": "S at which the exact inverse is found as well; 0 for none",
    "exact_samples": "images for the exact inverse",
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
    most = max(args.exact_samples, *(experiment.num_images(s) for s in args.steps))
    if most > len(experiment.dataset):
        name = experiment.dataset.name
        raise ValueError(f"{name} has {len(experiment.dataset)} images, {most} were asked for")
    if args.exact_samples < 2:
        raise ValueError("--exact-samples must be at least 2, for a standard error, got 1")
    for s in filter(None, args.exact_steps):
        experiment.tau(s)
    experiment.begin_with_model()
    order = np.random.default_rng(args.seed).permutation(len(experiment.dataset))[:most]
    cells = []
    for s in args.steps:
        chosen = order[: experiment.num_images(s)]
        cells.append(
            {"S": s} | experiment.cell(f"plain-S{s}", partial(plain, experiment, s, chosen))
        )
    inverses = []
    for s in [s for s in args.exact_steps if s]:
        chosen = order[: args.exact_samples]
        inverses.append(
            {"S": s} | experiment.cell(f"exact-S{s}", partial(exact, experiment, s, chosen))
        )
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
    return experiment.finish(cells, figure, caption, exact=inverses)


def plain(experiment: Experiment, steps: int, chosen: np.ndarray) -> Cell:
    """Encode and decode with the plain encoder, ε at the target and at the source."""
    model, tau = experiment.model, experiment.tau(steps)

    def errors(params, x, eps_at):  # type: ignore[no-untyped-def]
        denoise = partial(model.apply_fn, params)
        decoded = ddim.reconstruct(denoise, x, model.schedule, tau, eps_at=eps_at)
        return ddim.reconstruction_error(x, decoded)

    jitted = jax.jit(errors, static_argnames="eps_at")
    found = {}
    for where, prefix in (("target", ""), ("source", "source_")):
        parts = [jitted(model.params, x, where) for x in _batches(experiment, chosen)]
        found[prefix + "error"], found[prefix + "se"] = mean_se(np.concatenate(parts))
    return found | {"num_images": len(chosen)}


def exact(experiment: Experiment, steps: int, chosen: np.ndarray) -> Cell:
    """Encode by the exact inverse of the sampler, and decode."""
    model, tau = experiment.model, experiment.tau(steps)

    @jax.jit
    def inverted(params, x):  # type: ignore[no-untyped-def]
        denoise = partial(model.apply_fn, params)
        inverse = ddim.invert(denoise, x, model.schedule, tau,
                              max_iterations=experiment.args.max_iterations)  # fmt: skip
        decoded = ddim.sample(denoise, inverse.x_T, model.schedule, tau)
        return inverse, ddim.reconstruction_error(x, decoded)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the cell says how many failed
        parts = [jax.device_get(inverted(model.params, x)) for x in _batches(experiment, chosen)]
    error, residual, converged = (
        np.concatenate(v)
        for v in zip(*((e, inverse.residual, inverse.converged) for inverse, e in parts))
    )
    mean, se = mean_se(error)
    return {
        "error": mean,
        "se": se,
        "median_error": float(np.median(error)),
        "converged": float(converged.mean()),
        "converged_error": float(error[converged].mean()) if converged.any() else None,
        "median_residual": float(np.median(residual)),
        "largest_residual": float(residual.max()),
        "network_calls_per_step": float(
            np.mean([inverse.iterations.mean() for inverse, _ in parts])
        ),
        "num_images": len(chosen),
    }


def mean_se(x: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    x = np.asarray(x, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))


def _batches(experiment: Experiment, chosen: np.ndarray) -> list[jax.Array]:
    size = experiment.args.batch_size
    starts = range(0, len(chosen), size)
    return [to_model(experiment.dataset.take(chosen[i : i + size])["image"]) for i in starts]


if __name__ == "__main__":
    run(main)
