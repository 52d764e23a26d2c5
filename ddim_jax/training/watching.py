"""Weights & Biases, for those who ask for it: the metrics and pictures of a run on their server."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.storage.files import write_whole

IDENTITY = "wandb.json"  # in the run folder: which run of which project this is
PROJECT = "ddim_jax"


def check_wandb(directory: pathlib.Path, project: str) -> None:
    """Raises, before anything is written, where a run cannot be watched on W&B.

    Args:
      directory: the run folder.
      project: where to.

    Raises:
      ModuleNotFoundError: wandb is not installed.
      ValueError: no project's name, or the run is watched in another.
    """
    if not project or set(project) & set("/\\#?%:"):
        raise ValueError(f"no name for a W&B project: {project!r}: it has none of / \\ # ? % :")
    try:
        import wandb as wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--wandb (wandb=...) needs the package wandb: pip install 'wandb>=0.17', or in a "
            "checkout pip install '.[wandb]'"
        ) from error
    known = _identity(directory)
    if known and known["project"] != project:
        raise ValueError(
            f"{directory} is watched in the W&B project {known['project']!r}, asked for is "
            f"{project!r}: keep it, or remove {directory / IDENTITY} to begin a new W&B run"
        )


class WandB:
    """A run on W&B: begun once, gone on with whenever the run folder is resumed.

    Steps that are run again after a resume are the same steps: W&B keeps what it has of them.
    WANDB_MODE=offline and the other variables of W&B hold.

    Args:
      directory: the run folder; its name is the run's.
      project: where to.
      config: the run's configuration.
    """

    def __init__(self, directory: pathlib.Path, project: str, config: Mapping[str, Any]):
        import wandb

        self._module = wandb
        known = _identity(directory)
        self._run = wandb.init(
            project=project,
            id=known.get("id"),
            name=None if known else directory.resolve().name,
            dir=str(directory),
            config=dict(config),
            resume="allow",
        )
        if not known:
            said = {"project": project, "id": self._run.id}
            write_whole(directory / IDENTITY, (json.dumps(said) + "\n").encode())

    def line(self, line: Mapping[str, float]) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        self._run.log(values, step=int(line["step"]))

    def picture(self, step: int, pixels: np.ndarray) -> None:
        self._run.log({"samples": self._module.Image(pixels)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _identity(directory: pathlib.Path) -> dict[str, str]:
    path = directory / IDENTITY
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        return {"project": str(known["project"]), "id": str(known["id"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not say a W&B project and run: mend it, or remove it to begin a new one"
        ) from error
