"""`ddim-jax export`."""

from __future__ import annotations

import pathlib

import tyro

from ddim_jax.cli.options import SourceOptions
from ddim_jax.networks.unet import count_params
from ddim_jax.weights import save_diffusers, save_model


def export(
    model: tyro.conf.Positional[str],
    out: tyro.conf.Positional[pathlib.Path],
    source: SourceOptions,
    float16: bool = False,
    diffusers: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model as one .safetensors file, or as a folder that diffusers loads.

    Args:
      model: a run folder (its moving average is taken), or anything that `sample` takes.
      out: the file or folder to write.
      float16: halve the file; weights are rounded to 11 bits and read back as float32.
      diffusers: write a folder for `DDIMPipeline.from_pretrained`.
      overwrite: replace the file if it exists (never a folder).
    """
    if diffusers and float16:
        raise ValueError("--float16 is for a .safetensors file; a diffusers folder is float32")
    if not diffusers and out.suffix != ".safetensors":
        raise ValueError(
            f"a model is written as one .safetensors file, or with --diffusers as a folder; got "
            f"{out}: name it {out.with_suffix('.safetensors')}"
        )
    if out.exists() and (diffusers or not overwrite):
        raise FileExistsError(f"{out} exists; choose another, or pass --overwrite for a file")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} for {out.name}; make it first")
    loaded = source.load(model)
    if diffusers:
        save_diffusers(out, loaded)
    else:
        save_model(out, loaded, float16=float16, overwrite=overwrite)
    print(f"wrote {out}: {count_params(loaded.params):,} parameters; ddim-jax sample {out}")
