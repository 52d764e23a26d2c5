"""Few calls: students of progressive distillation beside DDIM and the solvers, at the same calls.

    python -m experiments.distillation [--model digits] [--out results/distillation]

A ladder of students for each seed, `--teacher-steps` to the least of `--steps`, in run folders
`ladder-N/steps-S`; each is scored by the Fréchet distance to the data on `--num-images` samples, as
are DDIM and every `--method` along every `--spacings` from the same x_T. A killed run goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax.pictures.images import to_uint8
from ddim_jax.sampling import find_method
from ddim_jax.training.distilling import RECIPE, distill, halvings
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment

METHODS = ["unipc-2", "dpm-solver-2"]
SMALL = {"steps": [8, 4, 2, 1], "teacher_steps": 32, "seeds": [0, 1, 2], "updates": 700,
         "train_batch": 32, "learning_rate": 1e-3, "gamma": "truncated-snr",
         "method": METHODS, "spacings": ["linear", "quadratic", "logsnr"], "also": [50],
         "num_images": ["2000"]}  # fmt: skip
FULL = {"updates": RECIPE.num_updates, "train_batch": RECIPE.batch_size, "teacher_steps": 1024,
        "learning_rate": RECIPE.learning_rate, "num_images": ["50000"], "seeds": [0]}  # fmt: skip
HELP = {
    "teacher_steps": "S of the first teacher, DDIM along a linear τ",
    "seeds": "of a ladder's training, and of the x_T that its row is drawn from",
    "updates": "of each stage",
    "train_batch": "images of an update",
    "learning_rate": "at the start of each stage",
    "gamma": "the weight of each t",
    "method": "the solvers beside DDIM",
    "spacings": "of the solvers' τ and of DDIM's",
    "also": "S of further cells of DDIM along a linear τ, to compare with",
}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Distils and scores."""
    args = parse(
        "distillation", __doc__.splitlines()[0], argv, SMALL, FULL, without=["spacing"], **HELP
    )
    experiment = Experiment("distillation", args)
    model, T = experiment.model, experiment.model.schedule.num_steps
    ladder = halvings(ddim.timesteps(T, args.teacher_steps), T, min(args.steps))
    if missing := {*args.steps} - {len(tau) for tau in ladder[1:]}:
        raise ValueError(f"no student of {args.teacher_steps} steps has {sorted(missing)} steps")
    experiment.begin_with_model()
    cells = []
    for seed in args.seeds:
        students = _students(experiment, seed)
        for steps in dict.fromkeys([*args.steps, *args.also]):
            ways = {"ddim-linear": ("ddim", experiment.tau(steps, "linear"), model)}
            if steps in args.steps:
                ways = {"student": ("ddim", students[steps].tau, students[steps])}
                for name in ("ddim", *args.method):
                    ways |= {f"{name}-{spacing}": (name, experiment.tau(steps, spacing), model)
                             for spacing in args.spacings}  # fmt: skip
            for way, (name, tau, network) in ways.items():
                judge = partial(_judge, experiment, network, tau, name, seed)
                cell = experiment.cell(f"{way}-S{steps}-seed{seed}", judge)
                cells.append({"way": way, "S": steps, "seed": seed, **cell})
    rows = _rows(cells)
    for row in rows:
        print(f"S = {row['S']}: {row['way']} {row['distance']:.3f} ± {row['se']:.3f}", flush=True)
    figure = drawing.lines(_series(rows), "network calls S", cells[0]["name"])
    caption = (
        f"{cells[0]['name']} of {cells[0]['num_images']:,} samples at η = 0, mean of "
        f"{len(args.seeds)} seeds (bars: standard error); each solver on the best of its τ."
    )
    floors = [experiment.floor(n) for n in sorted({c["num_images"] for c in cells})]
    return experiment.finish(cells, figure, caption, rows=rows, floors=floors)


def _students(experiment: Experiment, seed: int) -> dict[int, ddim.Model]:
    """S → student, trained where they are not yet."""
    args, model = experiment.args, experiment.model
    config = dataclasses.replace(
        RECIPE,
        num_updates=args.updates,
        batch_size=args.train_batch,
        learning_rate=args.learning_rate,
        gamma=args.gamma,
        seed=seed,
        flip=model.facts.get("train", {}).get("flip", False),
        log_every=max(1, args.updates // 20),
        checkpoint_every=max(1, args.updates // 4),
        sample_every=args.updates,
        keep=1,
    )
    folder, tau = args.out / f"ladder-{seed}", ddim.timesteps(
        model.schedule.num_steps, args.teacher_steps
    )  # fmt: skip
    distill(model, tau, experiment.dataset, config, folder, to=min(args.steps), resume="auto",
            source=args.model or "digits", progress=False)  # fmt: skip
    return {s: ddim.load_model(folder / f"steps-{s}") for s in args.steps}


def _judge(experiment: Experiment, model: ddim.Model, tau: Any, method: str, seed: int) -> Cell:
    """The figures of one way to draw, image k from the same x_T in every cell of a seed."""
    number, size = experiment.num_images(len(tau)), experiment.args.batch_size
    sampler = ddim.make_sampler(model, tau, method=find_method(method))
    key = jax.random.key(seed)
    parts, classes = [], model.config.num_classes
    for first in range(0, number, size):
        numbers = np.arange(first, first + size) % number
        x_T = ddim.initial_noise(key, numbers, model.image_shape)
        labels = {} if classes is None else {"labels": numbers.astype(np.int32) % classes}
        parts.append(jax.device_get(to_uint8(sampler(x_T, **labels))))
    return experiment.score(np.concatenate(parts)[:number])


def _rows(cells: list[Cell]) -> list[Cell]:
    """Mean and standard error over seeds of each way at each S; of one seed its jackknife's."""
    found: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["S"], cell["way"]), []).append(cell)
    rows = []
    for (s, way), mine in found.items():
        d = [cell["distance"] for cell in mine]
        se = np.std(d, ddof=1) / len(d) ** 0.5 if len(d) > 1 else mine[0]["se"]
        rows.append({"S": s, "way": way, "distance": float(np.mean(d)), "se": float(se)})
    return rows


def _series(rows: list[Cell]) -> dict[str, Any]:
    """For each method, S, the distance on the best of its τ, and its error."""
    series: dict[str, Any] = {}
    for name in dict.fromkeys(_method(row) for row in rows):
        mine = [row for row in rows if _method(row) == name]
        best = [min((r for r in mine if r["S"] == s), key=lambda r: r["distance"])
                for s in sorted({row["S"] for row in mine})]  # fmt: skip
        series[name] = tuple([row[k] for row in best] for k in ("S", "distance", "se"))
    return series


def _method(row: Cell) -> str:
    return row["way"].rpartition("-")[0] or row["way"]


if __name__ == "__main__":
    run(main)
