"""Figure 5: the same x_T decoded along different τ gives the same image.

    python -m experiments.fig5 [--model digits] [--out results/fig5]

For every τ the correlation over pixels, and the mean squared error with pixels in [0, 1], of each
image with that of the longest τ; for comparison those of different x_T, and of η = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments import drawing, pipeline
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.table2 import mean_se

SMALL = {"steps": [10, 20, 50, 100, 1000], "num_images": ["32"], "shown": 10, "clip": False}
FULL = {"num_images": ["1000"]}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Draws, and compares with the longest τ."""
    help = {"shown": "images in the figure"}
    without = ["extractor", "spacing"]
    args = parse("fig5", __doc__.splitlines()[0], argv, SMALL, FULL, without=without, **help)
    experiment = Experiment("fig5", args)
    if len(numbers := {experiment.num_images(s) for s in args.steps}) > 1:
        raise ValueError(f"fig5 compares the same images at every S, got numbers {numbers}")
    experiment.begin_with_model(data=False)
    steps = sorted(args.steps)
    longest = pipeline.drawn(experiment, "0", steps[-1], "linear")
    rows = {("η = 0, linear", s): pipeline.drawn(experiment, "0", s, "linear") for s in steps[:-1]}
    rows |= {
        ("η = 0, quadratic", s): pipeline.drawn(experiment, "0", s, "quadratic") for s in steps[:-1]
    }
    rows |= {
        ("η = 1, linear", s): pipeline.drawn(experiment, "1", s, "linear") for s in steps[-2:-1]
    }
    rows["other x_T", steps[-1]] = np.roll(longest, 1, axis=0)
    cells = [{"what": w, "S": s, **agreement(x, longest)} for (w, s), x in rows.items()]
    shown = {f"{w}, S = {s}": x[: args.shown] for (w, s), x in rows.items() if w != "other x_T"}
    figure = drawing.strips({f"η = 0, linear, S = {steps[-1]}": longest[: args.shown]} | shown)
    caption = (
        f"Columns: {args.shown} of {len(longest)} latents x_T; rows: τ, with S calls. The numbers "
        f"compare each image with that of τ of S = {steps[-1]}, η = 0; errors are standard errors "
        "over images."
    )
    return experiment.finish(cells, figure, caption)


def agreement(images: np.ndarray, reference: np.ndarray) -> Cell:
    """Mean over images of the correlation and the squared error, pixels in [0, 1]."""
    x, y = (v.reshape(len(v), -1).astype(np.float64) / 255 for v in (images, reference))
    mse, mse_se = mean_se(((x - y) ** 2).mean(axis=1))
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (x, y))
    norms = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    correlation, se = mean_se((x * y).sum(axis=1) / np.maximum(norms, 1e-12))
    return {"correlation": correlation, "se": se, "mse": mse, "mse_se": mse_se,
            "num_images": len(images)}  # fmt: skip


if __name__ == "__main__":
    run(main)
