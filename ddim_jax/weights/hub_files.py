"""Which files of a repository one model needs, by their names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from ddim_jax.weights.diffusers_files import WeightsFile, choose, weights_file

FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SETTINGS = ("scheduler/scheduler_config.json", "scheduler_config.json", "model_index.json")


class Needed(NamedTuple):
    """What of a repository is to be downloaded."""

    model: str  # the folder, or the file, that is the model
    settings: list[str]  # small files that it needs
    weights: str
    shards: WeightsFile | None = None  # the weights, where they are an index


def needed(
    names: Collection[str],
    subfolder: str | None = None,
    filename: str | None = None,
    variant: str | None = None,
) -> Needed:
    """The files of a repository that one model needs.

    Args:
      names: of all its files.
      subfolder: where in it to look.
      filename: the file that is the model; else a diffusers folder (with unet/ in it, or itself
        one), or the only .safetensors file, or the only checkpoint of PyTorch.
      variant: of the weights of a diffusers folder.

    Returns:
      `Needed`.

    Raises:
      FileNotFoundError: it has no such file or folder, or no model.
      ValueError: it has several.

    Example:
      >>> needed(
      ...     [
      ...         "README.md",
      ...         "unet/config.json",
      ...         "unet/diffusion_pytorch_model.bin",
      ...         "unet/diffusion_pytorch_model.safetensors",
      ...         "scheduler/scheduler_config.json",
      ...     ]
      ... )
      Needed(model='', settings=['unet/config.json', 'scheduler/scheduler_config.json'],
             weights='unet/diffusion_pytorch_model.safetensors', shards=None)
    """
    root = f"{subfolder.strip('/')}/" if subfolder else ""
    beside = sorted(name.removeprefix(root) for name in names if name.startswith(root))
    if not beside:
        raise FileNotFoundError(f"it has no folder {root!r}; it has {_few(names)}")
    if filename is not None:
        if filename not in beside:
            raise FileNotFoundError(f"it has no file {root + filename!r}; it has {_few(names)}")
        folder, _, file = filename.rpartition("/")
        if weights_file(file) is None or f"{folder}/config.json".lstrip("/") not in beside:
            return Needed(root + filename, [], root + filename)
        inner = f"{root}{folder}/" if folder else root
        return _diffusers(names, inner, [file], variant, root + filename)
    for inner in ("unet_ema/", "unet/", ""):
        files = [n.removeprefix(inner) for n in beside if n.startswith(inner)]
        if "config.json" in files and any(weights_file(name) for name in files):
            files = [name for name in files if "/" not in name]
            return _diffusers(names, root + inner, files, variant, root)
    for ends in (".safetensors", FILES[1:]):
        found = [name for name in beside if name.endswith(ends) and "/" not in name]
        if len(found) == 1:
            return Needed(root + found[0], [], root + found[0])
        if found:
            raise ValueError(
                f"it has {len(found)} files of weights: choose one of {_few(found)} by "
                f"filename={found[0]!r}, or --filename {found[0]}"
            )
    raise FileNotFoundError(
        f"it has no model that is read here: no unet/config.json or config.json with weights "
        f"beside, and no file {', '.join(FILES)}; it has {_few(names)}"
    )


def _diffusers(
    names: Collection[str], inner: str, files: list[str], variant: str | None, model: str
) -> Needed:
    """A `UNet2DModel` in the folder `inner`, its weights one of `files`."""
    chosen = choose(files, variant)
    outer = re.sub(r"(^|/)unet(_ema)?/$", r"\1", inner)
    run = re.sub(r"(^|/)checkpoint-[^/]*/$", r"\1", outer)  # of diffusers' training script
    settings = [
        f"{inner}config.json",
        *(place + name for place in (outer, run) for name in SETTINGS),
    ]
    settings += [f"{inner}scheduler_config.json"]
    kept = [name for name in dict.fromkeys(settings) if name in names]
    return Needed(model, kept, inner + chosen.name, chosen if chosen.is_index else None)


def _few(names: Collection[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (", …" if len(ordered) > 8 else "")
