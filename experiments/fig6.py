"""Figure 6: images along the great arc between two x_T.

    python -m experiments.fig6 [--model digits] [--out results/fig6]

Each row decodes slerp(x_T, x_T', w), w = 0..1, at η = 0. Smooth: no step between neighbours is as
long as the way from end to end. Meaningful: the middle is as near to some image of the data as
drawn images are, and nearer than the mean of the two end images is; with --or-not-run not told
where no data are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.pictures.images import to_model, to_uint8
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.table2 import mean_se

SMALL = {"steps": [50], "paths": 8, "shown": 8, "points": 11}
FULL = {"paths": 100}
HELP = {
    "paths": "pairs of latents",
    "shown": "paths in the figure",
    "points": "images along a path, its ends included; odd",
}
AGAINST = 10_000  # images of the data among which the nearest is sought


def main(argv: Sequence[str] | None = None) -> Cell:
    """Interpolates, and measures the paths."""
    args = parse("fig6", __doc__.splitlines()[0], argv, SMALL, FULL, without=["extractor"], **HELP)
    if args.points < 3 or args.points % 2 == 0 or args.paths < 2 or len(args.steps) != 1:
        raise ValueError("fig6 takes one S, an odd number of points >= 3 and paths >= 2, got "
                         f"{args.steps}, {args.points} and {args.paths}")  # fmt: skip
    args.shown = min(args.shown, args.paths)
    experiment = Experiment("fig6", args)
    known = experiment.at_hand or not args.or_not_run
    experiment.begin_with_model(data=known)
    paths: list[np.ndarray] = []

    def measure() -> Cell:
        paths.append(decode(experiment))
        if not known:
            return measures(paths[0], None)
        data = experiment.dataset
        chosen = np.random.default_rng(0).permutation(len(data))[:AGAINST]
        return measures(paths[0], np.asarray(to_model(data.take(chosen)["image"])))

    cells = experiment.cell(f"S{args.steps[0]}", measure)
    drawn = paths[0] if paths else decode(experiment)
    weights = np.linspace(0, 1, args.points)
    figure = drawing.strips({f"path {i + 1}": path for i, path in enumerate(drawn[: args.shown])})
    caption = (
        f"{args.shown} of {args.paths} paths, each from one x_T (left) to another (right) by "
        f"slerp, {len(weights)} weights from 0 to 1, decoded with S = {args.steps[0]}, η = 0."
    )
    return experiment.finish(cells, figure, caption)


def decode(experiment: Experiment) -> np.ndarray:
    """(paths, points, H, W, C) images, in [−1, 1]."""
    model, args = experiment.model, experiment.args
    x_T = ddim.initial_noise(jax.random.key(args.seed), 2 * args.paths, model.image_shape)
    a, b = (jnp.repeat(x_T[i::2], args.points, axis=0) for i in (0, 1))
    weights = jnp.asarray(np.tile(np.linspace(0, 1, args.points), args.paths), x_T.dtype)
    latents = ddim.slerp(a, b, weights)
    tau = experiment.tau(args.steps[0])
    plan, devices = ddim.ddim()(model.schedule, tau), len(jax.local_devices())
    size = min(args.batch_size, -(-len(latents) // devices)) * devices
    latents = jnp.resize(latents, (-(-len(latents) // size) * size, *model.image_shape))
    numbers = np.resize(np.repeat(np.arange(args.paths), args.points), len(latents))
    starts = range(0, len(latents), size)
    parts = [
        experiment.stepper.run(
            latents[i : i + size],
            plan,
            key=jax.random.key(0),  # no noise is added
            numbers=numbers[i : i + size].astype(np.uint32),  # of K classes path i has the i-th
        )
        for i in starts
    ]
    drawn = np.asarray(to_uint8(jnp.concatenate(parts)))
    images = np.asarray(to_model(drawn[: args.paths * args.points]))
    return images.reshape(args.paths, args.points, *model.image_shape)


def measures(paths: np.ndarray, data: np.ndarray | None) -> Cell:
    """RMS lengths of the paths' steps, and distances to the nearest image of the data, if any."""
    whole = _rms(paths[:, 0] - paths[:, -1])
    steps = _rms(paths[:, 1:] - paths[:, :-1])
    middle = paths[:, paths.shape[1] // 2]
    sets = {
        "ends": paths[:, [0, -1]].reshape(-1, *paths.shape[2:]),
        "middle": middle,
        "pixel mean": (paths[:, 0] + paths[:, -1]) / 2,
    }
    return {
        "paths": len(paths),
        "points": paths.shape[1],
        "rms_end_to_end": float(whole.mean()),
        "rms_step": float(steps.mean()),
        "rms_largest_step": float(steps.max(axis=1).mean()),
        "smooth_share": float((steps.max(axis=1) < whole).mean()),
        "nearest": {} if data is None else {k: mean_se(_nearest(v, data)) for k, v in sets.items()},
        "data_images": 0 if data is None else len(data),
    }


def _rms(x: np.ndarray) -> np.ndarray:
    """Over the last three axes."""
    return np.sqrt((x.astype(np.float64) ** 2).mean(axis=(-3, -2, -1)))


def _nearest(images: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(n,) RMS distance of each image to the nearest one of the data."""
    x, y = (v.reshape(len(v), -1).astype(np.float64) for v in (images, data))
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squared.min(axis=1), 0) / x.shape[1])


if __name__ == "__main__":
    run(main)
