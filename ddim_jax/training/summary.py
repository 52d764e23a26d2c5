"""What a run folder holds: progress, loss curve, checkpoints, disk use, configuration."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ddim_jax.storage.checkpoint import restore_config, restore_part
from ddim_jax.storage.checkpoint_folder import CheckpointError, saved_steps
from ddim_jax.training.run_folder import LOG, read_metrics, writer

BLOCKS = "▁▂▃▄▅▆▇█"


def summarise(run: str | os.PathLike[str], verify: bool = False) -> dict[str, Any]:
    """Facts about a run, damaged or not.

    Args:
      run: the run folder.
      verify: also read every array of every checkpoint, and compare it with its digest.

    Returns:
      JSON-able dict: "state", "step", "loss", "checkpoints" (step → size and what is wrong with
      it), "megabytes", and last the "configuration" of the latest readable checkpoint.

    Raises:
      ValueError: the folder is not a run.
    """
    run = pathlib.Path(run)
    folder = run / "checkpoints"
    steps = saved_steps(folder)
    if not steps and not (run / LOG).exists():
        raise ValueError(f"{run} is not a run: it has no checkpoint and no {LOG}")
    configuration: dict[str, Any] = {}
    checkpoints = {}
    for step in tqdm(steps, unit="checkpoint", delay=1, disable=not verify):
        size = f"{_bytes(folder / str(step)) / 1e6:.1f} MB"
        try:
            configuration = restore_config(folder, step)
            if verify:
                for part in ("params", "ema", "opt_state", "step"):
                    restore_part(folder, part, step)
            checkpoints[str(step)] = size + (", every digest matches" if verify else "")
        except CheckpointError as error:
            checkpoints[str(step)] = f"{size}, UNREADABLE: {error}"
    lines = read_metrics(run / LOG) if (run / LOG).exists() else []
    by = writer(run)
    planned = configuration.get("train", {}).get("num_updates", "?")
    last = lines[-1] if lines else {}
    return {
        "state": f"being written by {by}" if by else "nobody writes in it",
        "step": f"{last.get('step', 0)} of {planned}",
        "loss": loss_line([line["loss"] for line in lines]),
        "last metrics": last,
        "checkpoints": checkpoints or "none yet",
        "megabytes": round(_bytes(run) / 1e6, 1),
        "configuration": configuration,
    }


def loss_line(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line of text, logarithmic: medians of `width` stretches, lowest to highest.

    Args:
      values: positive numbers, oldest first.
      width: characters.

    Returns:
      "first ▇▅▃▁ last", or "none yet".

    Example:
      >>> loss_line([1.0, 0.1, 0.01])
      '1.0000 █▅▁ 0.0100'
    """
    if not values:
        return "none yet"
    parts = np.array_split(np.asarray(values), min(width, len(values)))
    level = np.log([max(float(np.median(part)), 1e-30) for part in parts])
    span = max(float(np.ptp(level)), 1e-9)
    marks = ((level - level.min()) / span * (len(BLOCKS) - 1)).round().astype(int)
    return f"{values[0]:.4f} {''.join(BLOCKS[i] for i in marks)} {values[-1]:.4f}"


def _bytes(folder: pathlib.Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on removes old checkpoints
            total += path.stat().st_size if path.is_file() else 0
    return total
