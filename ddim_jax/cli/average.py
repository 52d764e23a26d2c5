"""`ddim-jax average`."""

from __future__ import annotations

import pathlib
import shlex

import tyro

from ddim_jax.training.averages import average as chosen
from ddim_jax.weights import save_model


def average(
    run: tyro.conf.Positional[pathlib.Path],
    sigma_rel: float,
    out: pathlib.Path,
    step: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weights of a run under a moving average of another length, as one file.

    Args:
      run: the folder of a run trained with --train.post-hoc.
      sigma_rel: the width of the average relative to the run, in (0, 0.28]: 0.10 remembers about
        the last third of the steps.
      out: the .safetensors file to write.
      step: at which, of those in the run's folder averages/; by default the last.
      overwrite: replace the file if it exists.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another --out, or pass --overwrite")
    model = chosen(run, sigma_rel, step)
    save_model(out, model, overwrite=overwrite)
    made = model.facts["average"]
    print(
        f"wrote {out}: the average of σ_rel = {sigma_rel:g} at step {made['step']}, its profile "
        f"within {made['profile_error']:.1%}; draw with: ddim-jax sample {shlex.quote(str(out))}"
    )
