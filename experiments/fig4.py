"""Figure 4: the time of sampling against S, and a straight line through it.

    python -m experiments.fig4 [--model digits] [--out results/fig4]

The shortest of several runs of one batch at each S, compilation excluded, and the least-squares
line: seconds per step and offset, each with its standard error, and R².
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

import ddim_jax as ddim
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.provenance import device

SMALL = {"steps": [10, 20, 50, 100, 200], "num_images": ["16"], "repeats": 5}
FULL = {"steps": [10, 20, 50, 100, 200, 500, 1000], "num_images": ["100"]}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Times and fits."""
    help = {"repeats": "runs at each S, of which the shortest counts"}
    args = parse("fig4", __doc__.splitlines()[0], argv, SMALL, FULL, without=["extractor"], **help)
    if len(set(args.steps)) < 3:
        raise ValueError(f"a line with an error needs three different S, got {args.steps}")
    experiment = Experiment("fig4", args)
    if len(numbers := {experiment.num_images(s) for s in args.steps}) > 1:
        raise ValueError(f"fig4 times one batch at every S, got numbers {numbers}")
    experiment.begin_with_model(data=False, device=device())
    cells = [{"S": s} | experiment.cell(f"S{s}", partial(timed, experiment, s)) for s in args.steps]
    steps = np.array([c["S"] for c in cells], float)
    shortest = np.array([c["shortest"] for c in cells])
    fit = line(steps, shortest)
    at = [0.0, float(steps.max())]
    figure = drawing.lines(
        {
            "shortest run": (steps.tolist(), shortest.tolist(), [0.0] * len(steps)),
            "line": (at, [fit["offset"] + fit["seconds_per_step"] * s for s in at], []),
        },
        "network calls S",
        "seconds for one batch",
        log="",
    )
    number = experiment.num_images(args.steps[0])
    caption = (
        f"Time to draw one batch of {number} images, shortest of {args.repeats} runs, without "
        f"compilation: {fit['seconds_per_step'] * 1e3:.3g} ± "
        f"{fit['seconds_per_step_se'] * 1e3:.1g} ms "
        f"a step and an offset of {fit['offset'] * 1e3:.3g} ± {fit['offset_se'] * 1e3:.1g} ms, "
        f"R² = {fit['r_squared']:.5f}."
    )
    return experiment.finish({"times": cells, "fit": fit}, figure, caption)


def timed(experiment: Experiment, steps: int) -> Cell:
    """Seconds of each repeated run of one batch, η = 0."""
    model, number = experiment.model, experiment.num_images(steps)
    sampler = ddim.make_sampler(model, experiment.tau(steps))
    x_T = ddim.initial_noise(jax.random.key(experiment.args.seed), number, model.image_shape)
    jax.block_until_ready(sampler(x_T))
    times = []
    for _ in range(experiment.args.repeats):
        began = time.perf_counter()
        jax.block_until_ready(sampler(x_T))
        times.append(time.perf_counter() - began)
    return {"shortest": min(times), "median": float(np.median(times)), "all": times,
            "num_images": number}  # fmt: skip


def line(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Least squares y = offset + seconds_per_step · x, with standard errors and R²."""
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    offset = y.mean() - slope * x.mean()
    rest = y - offset - slope * x
    variance = (rest**2).sum() / (len(x) - 2)
    spread = ((x - x.mean()) ** 2).sum()
    return {
        "seconds_per_step": float(slope),
        "seconds_per_step_se": float(np.sqrt(variance / spread)),
        "offset": float(offset),
        "offset_se": float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread))),
        "r_squared": float(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum()),
    }


if __name__ == "__main__":
    run(main)
