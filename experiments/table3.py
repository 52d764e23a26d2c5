"""Table 3: the distance on LSUN at 256×256, η = 0 and 1. Not run without weights.

    python -m experiments.table3 --model diffusion_lsun_bedroom_model/model-2388000.ckpt \\
        --data lsun/bedroom --extractor inception:PATH --full

As `table1` with the paper's rows and columns; without --model it writes down that it was not run.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.arguments import parse, run
from experiments.common import Cell, Experiment, not_run
from experiments.table1 import table

SMALL = {"steps": [10, 20, 50, 100], "eta": ["0", "1"], "num_images": ["300"], "clip": False}
FULL = {"num_images": ["50000"]}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Runs the table where there is a model, and else says so."""
    args = parse("table3", __doc__.splitlines()[0], argv, SMALL, FULL)
    if args.model is None:
        return not_run("table3", args, "no LSUN weights were given (--model)")
    return table(Experiment("table3", args))


if __name__ == "__main__":
    run(main)
