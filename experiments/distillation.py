"""Few calls: students of progressive distillation beside DDIM and the solvers, at the same calls.

    python -m experiments.distillation [--model digits] [--out results/distillation]

A ladder of students for each seed, `--teacher-steps` to the least of `--steps`, in run folders
`ladder-N/steps-S`; each is scored by the Fréchet distance to the data on `--num-images` samples, as
are DDIM and every `--method` along every `--spacings` from the same x_T. A killed run goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax.generation.drawing import check_finite
from ddim_jax.sampling import find_method
from ddim_jax.sampling.plan import Plan, with_memory
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.distilling import RECIPE, distill, halvings, stage_folder
from experiments import drawing, pipeline
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.stepping import MEMORY, Stepper, numbers

FEW = 20  # calls beyond which no solver is drawn: DDIM alone
METHODS = ["unipc-2", "dpm-solver-2"]
SMALL = {"steps": [8, 4, 2, 1], "teacher_steps": 32, "seeds": [0, 1, 2], "updates": [700],
         "train_batch": 32, "learning_rate": 1e-3, "gamma": "truncated-snr",
         "method": METHODS, "spacings": ["linear", "quadratic", "logsnr"], "also": [50],
         "num_images": ["2000"]}  # fmt: skip
FULL = {"updates": [RECIPE.num_updates], "train_batch": RECIPE.batch_size, "teacher_steps": 1024,
        "learning_rate": RECIPE.learning_rate, "num_images": ["50000"], "seeds": [0]}  # fmt: skip
HELP = {
    "teacher_steps": "S of the first teacher, DDIM along a linear τ",
    "seeds": "of a ladder's training, and of the x_T that its row is drawn from",
    "updates": "of every stage, or one number for each, the first stage's first",
    "train_batch": "images of an update",
    "learning_rate": "at the start of each stage",
    "gamma": "the weight of each t",
    "method": f"the solvers beside DDIM, at up to {FEW} calls",
    "spacings": "of the solvers' τ and of DDIM's",
    "also": "S of further cells, without a student",
}


class Way(NamedTuple):
    """One way to draw, and whose numbers it gives."""

    name: str
    plan: Plan
    seed: int
    student: ddim.Model | None = None  # in place of the teacher

    def numbers(self) -> tuple[Any, ...]:
        """All that its images follow from, but for the teacher."""
        return self.seed, id(self.student), numbers(self.plan)


def main(argv: Sequence[str] | None = None) -> Cell:
    """Distils and scores."""
    args = parse(
        "distillation", __doc__.splitlines()[0], argv, SMALL, FULL, without=["spacing"], **HELP
    )
    experiment = Experiment("distillation", args)
    T = experiment.model.schedule.num_steps
    ladder = halvings(ddim.timesteps(T, args.teacher_steps), T, min(args.steps))
    if missing := {*args.steps} - {len(tau) for tau in ladder[1:]}:
        raise ValueError(f"no student of {args.teacher_steps} steps has {sorted(missing)} steps")
    configs = _configs(experiment, len(ladder) - 1)
    ways = _ways(experiment)
    experiment.begin_with_model()
    students = {}
    for seed in args.seeds:
        folder = args.out / f"ladder-{seed}"
        each = [dataclasses.replace(config, seed=seed) for config in configs]
        distill(experiment.model, ladder[0], experiment.dataset, each, folder, to=min(args.steps),
                resume="auto", source=args.model or "digits", progress=False)  # fmt: skip
        for tau in (tau for tau in ladder if len(tau) in args.steps):
            student = ddim.load_model(stage_folder(folder, tau))
            students[f"student-S{len(tau)}-seed{seed}"] = Way(
                "student", _plan("ddim", student, tau), seed, student
            )
    return _table(experiment, {**students, **ways})


def _configs(experiment: Experiment, stages: int) -> list[TrainConfig]:
    """Of each stage; intervals have one common divisor, so that all are one program."""
    args, updates = experiment.args, list(experiment.args.updates)
    if len(updates) not in (1, stages):
        raise ValueError(f"--updates takes one number, or one for each of {stages} stages, got "
                         f"{len(updates)}")  # fmt: skip
    unit = math.gcd(*updates)
    log_every = next(k for k in range(max(1, unit // 20), 0, -1) if unit % k == 0)
    config = dataclasses.replace(
        RECIPE,
        batch_size=args.train_batch,
        learning_rate=args.learning_rate,
        gamma=args.gamma,
        flip=experiment.model.facts.get("train", {}).get("flip", False),
        log_every=log_every,
        sample_every=0,  # a picture would compile a sampler of its own
        keep=1,
    )
    return [
        dataclasses.replace(config, num_updates=n,
                            checkpoint_every=max(1, n // 4 // log_every) * log_every)
        for n in (updates * stages)[:stages]
    ]  # fmt: skip


def _ways(experiment: Experiment) -> dict[str, Way]:
    """DDIM and the solvers: key of the cell → way."""
    args, model = experiment.args, experiment.model
    return {
        f"{name}-{spacing}-S{steps}-seed{seed}": Way(
            f"{name}-{spacing}", _plan(name, model, experiment.tau(steps, spacing)), seed
        )
        for name in ("ddim", *args.method)
        for seed in args.seeds
        for steps in dict.fromkeys([*args.steps, *args.also])
        if name == "ddim" or steps <= FEW
        for spacing in args.spacings
    }


def _plan(name: str, model: ddim.Model, tau: Any) -> Plan:
    """Of one memory, so that all are one program."""
    return with_memory(find_method(name)(model.schedule, tau), MEMORY)


def _table(experiment: Experiment, ways: dict[str, Way]) -> Cell:
    """Scores every way, the students first, and writes the result down."""
    args = experiment.args
    counts = {key: experiment.num_images(len(way.plan.t)) for key, way in ways.items()}
    student = next(way.student for way in ways.values() if way.student is not None)
    same = student.prediction.facts() == experiment.model.prediction.facts()
    stepper = experiment.stepper if same else Stepper(student)  # of the students
    floors: list[Cell] = []

    def first() -> None:
        floors.extend(experiment.floor(n) for n in sorted(set(counts.values())))

    same_as: dict[Any, str] = {}  # one call is Euler's, whatever the method and τ
    twins = {key: same_as.setdefault(way.numbers(), key) for key, way in ways.items()}
    jobs = {
        key: (partial(_drawn, experiment, stepper if way.student else experiment.stepper, way,
                      counts[key]), experiment.score)
        for key, way in ways.items() if twins[key] == key
    }  # fmt: skip
    found = pipeline.cells(experiment, jobs, first)
    found = {key: found[twin] for key, twin in twins.items() if twin in found}
    cells = [{"way": ways[key].name, "S": len(ways[key].plan.t), "seed": ways[key].seed, **cell}
             for key, cell in found.items()]  # fmt: skip
    if not cells:
        raise pipeline.OutOfTimeError("no cell was finished; the same command goes on")
    rows = _rows(cells)
    for row in rows:
        print(f"S = {row['S']}: {row['way']} {row['distance']:.3f} ± {row['se']:.3f}", flush=True)
    figure = drawing.lines(_series(rows), "network calls S", cells[0]["name"])
    caption = (
        f"{cells[0]['name']} of {cells[0]['num_images']:,} samples at η = 0, mean of "
        f"{len(args.seeds)} seeds (bars: standard error); each solver on the best of its τ."
    )
    missing = [key for key in ways if key not in found]
    return experiment.finish(cells, figure, caption, rows=rows, floors=floors, missing=missing)


def _drawn(experiment: Experiment, stepper: Stepper, way: Way, number: int) -> np.ndarray:
    """Images, uint8 (n, H, W, C), image k from the same x_T in every cell of a seed."""
    key, devices = jax.random.key(way.seed), len(jax.local_devices())
    size = min(experiment.args.batch_size, -(-number // devices)) * devices
    params = None
    if way.student is not None:
        params = jax.device_put(way.student.params, stepper.whole)
    parts = []
    for start in range(0, number, size):
        pipeline.check_time(experiment)
        numbers = np.arange(start, start + size, dtype=np.uint32) % np.uint32(number)
        x = stepper.run(stepper.noise(key, numbers), way.plan, numbers=numbers, params=params)
        parts.append(stepper.pixels(x))
    images, finite = (np.concatenate(v)[:number] for v in zip(*jax.device_get(parts)))
    check_finite(np.flatnonzero(~finite))
    return images


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
