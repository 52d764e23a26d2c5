"""Figure 3: samples for every η (and σ̂) and S, all from the same x_T.

python -m experiments.fig3 [--model digits] [--out results/fig3]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from experiments import drawing, pipeline
from experiments.arguments import parse, row_label, run
from experiments.common import Cell, Experiment

SMALL = {"steps": [10, 20, 50, 100], "eta": ["0", "1", "hat"], "num_images": ["36"],
         "shown": 36, "clip": False}  # fmt: skip
FULL = {"steps": [10, 100]}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Draws the grid."""
    args = parse(
        "fig3",
        __doc__.splitlines()[0],
        argv,
        SMALL,
        FULL,
        without=["extractor"],
        shown="images in each panel",
    )
    experiment = Experiment("fig3", args)
    rows = {eta: row_label(eta) for eta in args.eta}
    experiment.begin_with_model(data=False)
    panels, cells = {}, []
    for s in args.steps:
        for eta, row in rows.items():
            cell = experiment.cell(f"eta{eta}-S{s}", partial(_draw, experiment, eta, s))
            cells.append({"eta": eta, "S": s, **cell})
            panels[row, f"S = {s}"] = images = pipeline.drawn(experiment, eta, s)[: args.shown]
    ordered = {(row, f"S = {s}"): panels[row, f"S = {s}"] for row in rows.values() for s in
               args.steps}  # fmt: skip
    caption = (
        f"{len(images)} samples in each panel, {experiment.spacing} τ, every panel from the same "
        "x_T. Rows: the noise; columns: network calls."
    )
    return experiment.finish(cells, drawing.panels(ordered), caption)


def _draw(experiment: Experiment, eta: str, steps: int) -> Cell:
    return {"num_images": len(pipeline.drawn(experiment, eta, steps))}


if __name__ == "__main__":
    run(main)
