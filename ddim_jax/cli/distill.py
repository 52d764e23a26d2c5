"""`ddim-jax distill`."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from typing import Literal

import tyro

from ddim_jax.cli.options import ProcessOptions, SourceOptions, check_writable
from ddim_jax.cli.runs import check_apart, draw_loss, tell
from ddim_jax.cli.ways import Spacing
from ddim_jax.process import timesteps
from ddim_jax.training import distilling
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.distilling import RECIPE, halvings, stage_folder
from ddim_jax.training.presets import DataConfig, learned_from


def distill(
    model: tyro.conf.Positional[str],
    source: SourceOptions,
    processes: ProcessOptions,
    out: pathlib.Path,
    steps: int | None = None,
    to: int = 1,
    spacing: Spacing = "linear",
    data: DataConfig = DataConfig(""),  # noqa: B008
    data_dir: pathlib.Path | None = None,
    train: TrainConfig = RECIPE,
    resume: Literal["never", "auto"] = "never",
) -> None:
    """Teach a model to draw in half as many steps, again and again (progressive distillation).

    Each stage is a run in OUT/steps-N, which `sample` and all others take, and draw with N network
    calls by themselves. SIGTERM or Ctrl-C saves and exits with code 75; the same command with
    --resume auto goes on. Guidance is not distilled: classes pass through without it.

    Args:
      model: the teacher, see `sample`.
      out: the folder of all stages.
      steps: S, the teacher's network calls with DDIM, 32 by default; a distilled model has its own.
      to: the last student's; S is to · 2, to · 4, ….
      spacing: of the teacher's τ.
      data: the images to noise, by default those that the teacher learned from.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      train: of each stage. The prediction is by default the teacher's, and v where that is eps.
      resume: "never": no stage may have begun. "auto": finished stages stay, and the next goes on.
    """
    if to < 1 or (steps is not None and steps < 1):
        raise ValueError(f"--steps and --to must be at least 1, got {steps} and {to}")
    check_writable(out / "checkpoints")
    processes.join()
    teacher = source.load(model)
    num_steps, tau = teacher.schedule.num_steps, teacher.tau
    if tau is None:
        tau = timesteps(num_steps, steps or 32, spacing, schedule=teacher.schedule)
    elif steps not in (None, len(tau)) or spacing != "linear":
        raise ValueError(
            f"{model} draws in {len(tau)} steps, along {tau.tolist()}, and can be halved from "
            "there alone: leave out --steps and --spacing"
        )
    ladder = halvings(tau, num_steps, to)
    if not data.name:
        data = _as_then(learned_from(teacher.facts), data, model)
    check_apart(out, data.name, data_dir)
    dataset = data.load(data_dir)
    distilling.distill(
        teacher, tau, dataset, train, out, to=to, source=model, resume=resume, say=tell
    )
    folders = [stage_folder(out, students) for students in ladder[1:]]
    for folder in folders:
        draw_loss(folder)
    tell(f"done: {', '.join(map(str, folders))}; draw with: ddim-jax sample "
         f"{shlex.quote(str(folders[-1]))}")  # fmt: skip


def _as_then(own: DataConfig | None, given: DataConfig, model: str) -> DataConfig:
    """The data that the teacher learned from, but for what is said of them here."""
    if own is None:
        raise ValueError(
            f"{model} does not say what it learned from: name it with --data.name (data that are "
            "code, module:function, are run only where they are named)"
        )
    usual = DataConfig("")
    said = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    return dataclasses.replace(
        own, **{name: value for name, value in said.items() if value != getattr(usual, name)}
    )
