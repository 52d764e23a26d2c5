"""Table 1: the Fréchet distance for every η (and σ̂) and number of steps S.

    python -m experiments.table1 [--model digits] [--out results/table1] [--full]

Every cell draws its images from the same x_T. With the FID's own Inception weights and 50,000
samples the figure is the paper's FID; with any other extractor it is called after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments import drawing, pipeline
from experiments.arguments import parse, row_label, run
from experiments.common import Cell, Experiment, sizes
from experiments.judging import jackknife_blocks

SMALL = {"steps": [10, 20, 50, 100], "eta": ["0", "0.2", "0.5", "1", "hat"], "num_images": ["300"],
         "clip": False}  # fmt: skip
FULL = {"steps": [10, 20, 50, 100, 1000], "num_images": ["50000"]}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Runs the table, and writes it down."""
    return table(Experiment("table1", parse("table1", __doc__.splitlines()[0], argv, SMALL, FULL)))


def table(experiment: Experiment) -> Cell:
    """All cells (η, S) of the arguments' rows and columns, and the floor beside them."""
    if lacking := experiment.without_data():
        return lacking
    args = experiment.args
    labels = {eta: row_label(eta) for eta in args.eta}
    counts = {s: experiment.num_images(s) for s in args.steps}
    for s in args.steps:
        experiment.tau(s)
    experiment.begin_with_model()
    where = {f"eta{eta}-S{s}": (eta, s) for s in args.steps for eta in args.eta}
    jobs = {key: (partial(pipeline.drawn, experiment, *of), partial(_score, experiment, *of))
            for key, of in where.items()}  # fmt: skip
    floors: list[Cell] = []

    def first() -> None:
        floors.extend(experiment.floor(n) for n in sorted(set(counts.values())))

    found = pipeline.cells(experiment, jobs, first)
    cells = [{"eta": eta, "S": s, **found[key]} for key, (eta, s) in where.items() if key in found]
    if not cells:
        raise pipeline.OutOfTimeError("no cell was finished; the same command goes on")
    series: dict[str, Any] = {}
    for eta, label in labels.items():
        row = [c for c in cells if c["eta"] == eta]
        if not row:
            continue
        series[label] = tuple([c[k] for c in row] for k in ("S", "distance", "se"))
    name = cells[0]["name"]
    figure = drawing.lines(
        series,
        "network calls S",
        name,
        horizontal={f"real images, n = {f['num_images']:,}": f["distance"] for f in floors},
    )
    caption = (
        f"{name} of samples ({sizes(counts)}) against {experiment.against}, "
        f"{experiment.spacing} τ{', x̂_0 clipped' * args.clip}; bars are "
        f"one standard error (jackknife, {jackknife_blocks(min(counts.values()))} blocks). The "
        "distance depends on the number of samples: compare columns of equal numbers, with the "
        "floor of that number."
    )
    missing = [key for key in where if key not in found]
    return experiment.finish(cells, figure, caption, floors=floors, name=name, missing=missing)


def _score(experiment: Experiment, eta: str, steps: int, images: np.ndarray) -> Cell:
    return experiment.score(images) | {"network_calls": len(experiment.tau(steps))}


if __name__ == "__main__":
    run(main)
