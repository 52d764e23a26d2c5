"""What to predict and how to weigh it: ε, v, x_0, min-SNR, EDM's scaling, zero terminal SNR.

    python -m experiments.objectives [--data digits | mnist | FILE.npz] [--out results/objectives]

Networks of one preset learn from the same batches, for as many updates, and are scored by the
Fréchet distance at η = 0 from the same x_T. The data lie on the device; but for a CPU, whose loops
are slow, many updates are one call. What tells a run from others (seed, length, learning rate, γ,
ᾱ) is an argument of the compiled program: one compilation serves all that predict alike. An .npz
file holds `images`, uint8 (N, H, W[, C]), for the network of the preset with images of that shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

import ddim_jax as ddim
from ddim_jax import data
from ddim_jax.data import Dataset
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.presets import PRESETS, Preset
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.on_device import NUMBERS, Bench, Objective

OBJECTIVES = {
    "eps": Objective("eps"),
    "v": Objective("v"),
    "x_0": Objective("x_0"),
    "v-min-snr-5": Objective("v", "min-snr-5"),
    "x_0-min-snr-5": Objective("x_0", "min-snr-5"),
    "eps-min-snr-5": Objective("eps", "min-snr-5"),
    "edm": Objective("edm", "edm"),
    "v-zero-snr": Objective("v", zero_terminal_snr=True),
}
MORE = {
    "edm-one": Objective("edm"),
    "edm-min-snr-5": Objective("edm", "min-snr-5"),
    "eps-bound": Objective("eps", "bound"),
    "v-bound": Objective("v", "bound"),
    "v-edm": Objective("v", "edm"),
    "v-p2": Objective("v", "experiments.objectives:p2"),
    "x_0-zero-snr": Objective("x_0", zero_terminal_snr=True),
    "edm-zero-snr": Objective("edm", "edm", True),
}
SMALL = {"objectives": list(OBJECTIVES), "seeds": [0], "updates": [0], "steps": [10, 50],
         "num_images": ["2000"], "recipes": ["preset"], "chunk": 100}  # fmt: skip
FULL = {"seeds": [0, 1, 2]}
HELP = {
    "objectives": f"of {', '.join(OBJECTIVES | MORE)}",
    "seeds": "of the network and its batches",
    "updates": "lengths of training, each with its own decay of the rate; 0 for the preset's",
    "recipes": "the preset, or name=value[,name=value]: learning_rate, warmup_steps, ema_decay",
    "chunk": "updates in one call, where that is no CPU",
}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Trains and scores every objective."""
    words = {"without": ["extractor"], **HELP}
    args = parse("objectives", __doc__.splitlines()[0], argv, SMALL, FULL, **words)
    if args.model or args.config or args.schedule or args.prediction:
        raise ValueError("objectives trains its own networks: no --model, --config, --schedule or "
                         "--prediction")  # fmt: skip
    if unknown := sorted(set(args.objectives) - set(OBJECTIVES | MORE)):
        raise ValueError(f"no objective {unknown[0]!r}; choose of {', '.join(OBJECTIVES | MORE)}")
    dataset = data.load(args.data or "digits", data_dir=args.data_dir)
    preset = _preset(dataset)
    args.updates = [n or preset.train.num_updates for n in args.updates]
    recipes = {recipe: _recipe(recipe, preset.train) for recipe in args.recipes}
    args.extractor = "pixels"
    experiment = Experiment("objectives", args)
    experiment.dataset = dataset
    network = dataclasses.replace(preset.model, dtype=args.dtype or preset.model.dtype)
    bench = Bench(experiment, preset, network)
    what = {"network": network.facts(), "train": dataclasses.asdict(preset.train)}
    experiment.begin(data=dataset.provenance, sigma_data=bench.sigma_data, **what)
    cells = []
    for name in args.objectives:
        objective = (OBJECTIVES | MORE)[name]
        for recipe, config in recipes.items():
            for updates in args.updates:
                for seed in args.seeds:
                    now = dataclasses.replace(config, num_updates=updates, seed=seed)
                    key = f"{name}-{recipe}-{updates}-seed{seed}"
                    cell = experiment.cell(key, partial(bench.judged, key, objective, now))
                    run_of = {"objective": name, "recipe": recipe, "updates": updates, "seed": seed}
                    cells.append({**run_of, **cell})
    rows = [row for s in args.steps for row in summary(cells, s)]
    print(markdown(rows), flush=True)
    series: dict[str, Any] = {}
    for row in rows:
        label = ", ".join(run_name(row, len(recipes) > 1, len(args.updates) > 1))
        for values, name in zip(series.setdefault(label, ([], [], [])), ("S", "distance", "se")):
            values.append(row[name])
    floors = [experiment.floor(n) for n in sorted({experiment.num_images(s) for s in args.steps})]
    caption = (
        f"FD-pixels at η = 0 of {experiment.num_images(args.steps[0]):,} samples, mean over seeds "
        f"{', '.join(map(str, args.seeds))}; bars are one standard error."
    )
    figure = drawing.lines(series, "network calls S", "FD-pixels")
    return experiment.finish(cells, figure, caption, rows=rows, floors=floors, name="FD-pixels")


def run_name(row: Cell, recipe: bool, updates: bool) -> list[str]:
    """The words that tell a row from the others."""
    words = [row["objective"], row["recipe"], f"{row['updates']:,} updates"]
    return [word for word, shown in zip(words, (True, recipe, updates)) if shown]


def markdown(rows: Sequence[Cell]) -> str:
    """The rows of `summary` as a table, a column for each S."""
    steps = list(dict.fromkeys(row["S"] for row in rows))
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        shown = f"{row['distance']:.3g} ± {row['se']:.2g}"
        lines.setdefault(", ".join(run_name(row, True, True)), {})[row["S"]] = shown
    table = [["FD-pixels, η = 0", *(f"S = {s}" for s in steps)], ["---"] * (1 + len(steps))]
    table += [[name, *(line.get(s, "diverged") for s in steps)] for name, line in lines.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def summary(cells: Sequence[Cell], steps: int) -> list[Cell]:
    """Means over seeds at one S, with the standard error of each.

    Over several seeds it is the scatter of the seeds, which holds that of sampling; of one seed it
    is the jackknife's, which knows nothing of training.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if str(steps) in cell["distance"]:
            group = (cell["objective"], cell["recipe"], cell["updates"])
            groups.setdefault(group, []).append(cell)
    rows = []
    for (objective, recipe, updates), group in groups.items():
        values = np.array([cell["distance"][str(steps)] for cell in group])
        sampling = float(np.mean([cell["se"][str(steps)] for cell in group]))
        se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else sampling
        rows.append({"objective": objective, "recipe": recipe, "updates": updates, "S": steps,
                     "distance": float(values.mean()), "se": se, "sampling_se": sampling,
                     "seeds": len(values)})  # fmt: skip
    return rows


def p2(schedule: ddim.Schedule, prediction: ddim.Prediction) -> np.ndarray:
    """P2 weighting (Choi et al. 2022, Eq. 8) with k = 1, exponent 1: 1/(1 + SNR) on the error of ε.

    A γ of one's own, given by module:function: that error is the output's times √ᾱ_t for v.
    """
    if prediction.kind != "v":
        raise ValueError(f"p2 is written for v here, got {prediction.kind!r}")
    a = np.asarray(schedule.alpha_bar, np.float64)
    return (1 - a) * a


def _recipe(words: str, config: TrainConfig) -> TrainConfig:
    """The preset's configuration with name=value,… in it."""
    changes: dict[str, Any] = {}
    for word in words.split(",") if words != "preset" else ():
        name, _, value = word.partition("=")
        own = getattr(config, name, None)
        if name not in (*NUMBERS[1:-1], "batch_size", "cosine_decay"):
            names = ", ".join((*NUMBERS[1:-1], "batch_size", "cosine_decay"))
            raise ValueError(f"--recipes takes preset, or name=value of {names}; got {word!r}")
        try:
            changes[name] = value == "True" if isinstance(own, bool) else type(own)(value)
        except ValueError:
            raise ValueError(f"--recipes: {name} is no {type(own).__name__}: {value!r}") from None
    return dataclasses.replace(config, **changes)


def _preset(dataset: Dataset) -> Preset:
    """The preset of that name, or with images of that shape."""
    presets = [make() for make in PRESETS.values()]
    found = [p for p in presets if p.model.image_shape == dataset.image_shape]
    if not found:
        raise ValueError(f"no preset has images of {dataset.image_shape}; there are "
                         f"{', '.join(str(p.model.image_shape) for p in presets)}")  # fmt: skip
    if found[0].train.flip or found[0].model.dropout:
        raise ValueError(f"preset {found[0].name} flips images or has dropout: not done here")
    return found[0]


if __name__ == "__main__":
    run(main)
