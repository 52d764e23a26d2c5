"""Progressive distillation (Salimans & Ho 2022): S network calls, S/2, …, 1, each stage a run.

A stage is `fit` with another loss: the student starts from its teacher's weights, t is one of its
own τ, and what it learns is where two of the teacher's DDIM steps lead (`distillation_loss`). The
student is the next teacher.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddim_jax.data import Dataset
from ddim_jax.process.distillation import halve_timesteps, loss_of_steps, two_steps
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.prediction import Prediction
from ddim_jax.process.spacing import as_timesteps
from ddim_jax.storage.checkpoint_folder import saved_steps
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.loop import fit
from ddim_jax.training.resuming import check_run
from ddim_jax.training.starting import start_from
from ddim_jax.weights import Model, load_model

RECIPE = TrainConfig(  # of each stage; Salimans & Ho, App. E, but for the average
    batch_size=128,
    num_updates=50_000,
    gamma="truncated-snr",
    learning_rate=1e-4,
    warmup_steps=0,
    cosine_decay=True,
    ema_decay=0.999,
)


def taught_by(teacher: Model, tau: Sequence[int] | np.ndarray, size: int | None = None) -> Partial:
    """The loss of a student of the teacher's DDIM steps along τ, for `fit(..., loss=)`.

    Labels pass through to the teacher. Its weights and τ are arguments of the compiled step, so
    that the losses of one `size` are one program.

    Args:
      teacher: of `load_model`, or a `Model` of your own.
      tau: (S,) its τ, S even; the student's is `halve_timesteps(tau, T)`.
      size: columns of the table of steps, a multiple of S/2, which it is by default: the table is
        repeated. The value does not depend on it.

    Returns:
      A `jax.tree_util.Partial` (student, schedule, x_0, key, gamma, indices=…, labels=…) → scalar.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> network = ddim.predicts(lambda w, x, t: w * x, "v")
      >>> teacher = ddim.Model(network, jnp.ones(()), ddim.linear_schedule(1000))
      >>> loss = taught_by(teacher, [500, 1000])
      >>> student = ddim.predicts(lambda x, t: 0.5 * x, "v")
      >>> x_0, key = jnp.ones((4, 2)), jax.random.key(0)
      >>> bool(loss(student, teacher.schedule, x_0, key, None) > 0)
      True
    """
    table = two_steps(tau, teacher.schedule.num_steps)
    if size is not None:
        if size % table.shape[1]:
            raise ValueError(f"size must be a multiple of S/2 = {table.shape[1]}, got {size}")
        table = np.tile(table, size // table.shape[1])

    def loss(
        params: Any, table: jax.Array, student: Any, schedule: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        labels = {"labels": kwargs.pop("labels")} if "labels" in kwargs else {}
        apply_fn = partial(teacher.apply_fn, params, **labels)
        return loss_of_steps(student, apply_fn, schedule, table, *args, **kwargs)

    return Partial(loss, teacher.params, jnp.asarray(table))


def halvings(tau: Sequence[int] | np.ndarray, num_steps: int, to: int = 1) -> list[np.ndarray]:
    """The τ of a ladder: the first teacher's (S,), its student's (S/2,), …, the last one's (to,).

    Raises:
      ValueError: S is not to · 2, to · 4, …; or τ is not strictly increasing in 1..T.

    Example:
      >>> [len(tau) for tau in halvings(range(1, 33), 1000, to=4)]
      [32, 16, 8, 4]
    """
    ladder = [as_timesteps(tau, num_steps)]
    steps = len(ladder[0])
    if to < 1 or steps <= to or steps % to or (steps // to) & (steps // to - 1):
        known = steps // (steps & -steps)
        raise ValueError(
            f"halving S = {steps} again and again does not lead to {to} steps: begin with "
            f"{to if to > 0 else 1} · 2, · 4, · 8, … steps"
            + (f", or end at {known}" if known not in (to, steps) else "")
        )
    while len(ladder[-1]) > to:
        ladder.append(halve_timesteps(ladder[-1], num_steps))
    return ladder


def stage_folder(directory: pathlib.Path, tau: np.ndarray) -> pathlib.Path:
    """The run folder of the student of τ.

    Example:
      >>> stage_folder(pathlib.Path("few"), np.array([500, 1000])).as_posix()
      'few/steps-2'
    """
    return directory / f"steps-{len(tau)}"


def distill(
    model: Model,
    tau: Sequence[int] | np.ndarray,
    dataset: Dataset,
    config: TrainConfig | Sequence[TrainConfig],
    directory: str | PathLike[str],
    *,
    to: int = 1,
    source: str = "",
    resume: Literal["never", "auto"] = "never",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Model:
    """Distils a model, stage by stage: `directory/steps-16`, `steps-8`, …, each a run folder.

    Every stage is a run of `fit` with all that belongs to it; `load_model` takes its folder, and
    the `Model` has its τ. A student starts from its teacher's weights, the moving average of the
    stage before. It has no dropout: its target is a function of x_t. All stages are one compiled
    program where their batches, intervals and settings are one, whatever their number of updates:
    with JAX's compilation cache (`JAX_COMPILATION_CACHE_DIR`) only the first is compiled.

    Args:
      model: the teacher, of `load_model`.
      tau: (S,) its τ, S = to · 2^k.
      dataset: the images to noise; those that the teacher learned from.
      config: of each stage, `RECIPE`, say; or as many as there are stages, the first one's first.
        A student predicts `config.prediction` where that is "x_0", "v" or "edm"; where it is "eps",
        the default, what its teacher does, and v where that is ε, of which few steps at much noise
        make nothing.
      directory: made if missing.
      to: S of the last student.
      source: the model's name, to be kept.
      resume: "never": no stage may have begun. "auto": finished stages stay, an unfinished one goes
        on from its last checkpoint, bit for bit.
      progress, say: as `fit`.

    Returns:
      The last student.

    Raises:
      ValueError: S does not lead to `to`; images have another shape than the model's; the model
        predicts ε where ᾱ_t = 0, or a variance too; or as `fit` and `start_from`.
      FileExistsError: a stage has begun and `resume` is "never".
      Preempted: as `fit`.
    """
    directory, schedule = pathlib.Path(directory), model.schedule
    ladder = halvings(tau, schedule.num_steps, to)
    folders = [stage_folder(directory, students) for students in ladder[1:]]
    configs = [config] * len(folders) if isinstance(config, TrainConfig) else list(config)
    if len(configs) != len(folders):
        raise ValueError(
            f"got {len(configs)} configs for {len(folders)} stages: give one, or one for each"
        )
    configs = [dataclasses.replace(c, **_learned(model.prediction, c)) for c in configs]
    model.prediction.check(coefficients(schedule, ladder[0], 0))
    if model.config.out_channels not in (None, model.config.in_channels):
        raise ValueError(
            "a network with a learned variance cannot be distilled: its steps have none"
        )
    if dataset.image_shape != model.image_shape:
        raise ValueError(
            f"the model has images {model.image_shape}, {dataset.name} {dataset.image_shape}: name "
            "the data that it learned from, cropped and resized as then"
        )
    if (directory / "checkpoints").exists():
        raise FileExistsError(f"{directory} is itself a run: choose a new folder for the stages")
    classes = model.config.num_classes
    for config, folder in zip(configs, folders):
        check_run(dataset, config, folder, None, classes, resume)
    if model.prediction.kind not in ("x_0", configs[0].prediction):
        say(
            f"the teacher predicts {model.prediction.kind}, its students "
            f"{configs[0].prediction}: the first of them has that to learn too"
        )
    network = dataclasses.replace(model.config, dropout=0.0)
    for before, own, config, folder in zip(ladder, ladder[1:], configs, folders):
        start = start_from(model, network, source)
        facts = {k: v for k, v in start.facts.items() if k not in Prediction("edm").facts()}
        facts |= {"tau": own.tolist(), "teacher_tau": before.tolist()}
        begun = "going on" if saved_steps(folder / "checkpoints") else f"into {folder}"
        say(f"{len(before)} steps to {len(own)}, {config.num_updates:,} updates, {begun}")
        fit(
            start.apply_fn,
            start.params,
            schedule,
            dataset,
            config,
            folder,
            facts=facts,
            num_classes=classes,
            loss=taught_by(model, before, len(ladder[1])),
            resume=resume,
            progress=progress,
            say=say,
        )
        model, source = load_model(folder), folder.name
    return model


def _learned(teacher: Prediction, config: TrainConfig) -> dict[str, Any]:
    """What the students predict, as fields of a `TrainConfig`."""
    if config.prediction != "eps":
        return {}
    return {"prediction": "v"} if teacher.kind == "eps" else teacher.facts()
