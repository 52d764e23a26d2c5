"""The weights of a diffusers folder: which of its files, in one piece or in shards with an index.

| file | |
|---|---|
| diffusion_pytorch_model.safetensors, .bin | all tensors |
| diffusion_pytorch_model.fp16.safetensors, .bin | a variant of them, here "fp16" |
| diffusion_pytorch_model.safetensors.index.json | which tensor lies in which shard |
| diffusion_pytorch_model-00001-of-00002.safetensors | a shard |
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.storage.weights_file import read_safetensors, tensor_names
from ddim_jax.weights.containers import few
from ddim_jax.weights.torch_files import load_torch

STEM = "diffusion_pytorch_model"
VARIANT = r"(?:\.(?!safetensors|bin|index)([\w-]+?))?"  # diffusers has put it in three places
WEIGHTS = re.compile(
    rf"{STEM}{VARIANT}\.(safetensors|bin){VARIANT}(\.index)?{VARIANT}(?(4)\.json|)"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}")
FORMS = ("safetensors", "safetensors.index", "bin", "bin.index")  # the first there is read


class WeightsFile(NamedTuple):
    """One way to read the weights of a folder."""

    name: str
    variant: str | None
    form: str  # one of FORMS

    @property
    def is_index(self) -> bool:
        return self.form.endswith(".index")


def weights_file(name: str) -> WeightsFile | None:
    """What a file is by its name; None for a shard, and for what holds no weights.

    Example:
      >>> weights_file("diffusion_pytorch_model.fp16.safetensors")[1:]
      ('fp16', 'safetensors')
      >>> weights_file("diffusion_pytorch_model.safetensors.index.fp16.json")[1:]
      ('fp16', 'safetensors.index')
      >>> weights_file("diffusion_pytorch_model-00001-of-00002.safetensors")
    """
    match = WEIGHTS.fullmatch(name)
    if match is None or SHARD.search(name):
        return None
    variants = [variant for variant in match.group(1, 3, 5) if variant]
    if len(variants) > 1:
        return None
    return WeightsFile(name, variants[0] if variants else None, match[2] + (match[4] or ""))


def choose(names: Iterable[str], variant: str | None = None) -> WeightsFile:
    """The one file to read: of that variant; without one the plain weights, or the only variant.

    Args:
      names: of the files of a folder.
      variant: "fp16" for one.

    Returns:
      `WeightsFile`; of several forms the first of `FORMS`.

    Raises:
      ValueError: there is none, or there are several variants and no word which.

    Example:
      >>> choose(["config.json", f"{STEM}.bin", f"{STEM}.safetensors", f"{STEM}.fp16.bin"]).name
      'diffusion_pytorch_model.safetensors'
    """
    there = sorted(names)
    files = [file for file in map(weights_file, there) if file]
    variants = sorted({file.variant for file in files}, key=str)
    if not files:
        raise ValueError(
            f"it has neither {STEM}.safetensors nor {STEM}.bin, nor an index of shards; it has "
            f"{', '.join(there[:8])}{', …' if len(there) > 8 else ''}"
        )
    if variant is None and None not in variants:
        if len(variants) > 1:
            raise ValueError(
                f"it has the variants {', '.join(map(str, variants))} of its weights and none "
                f"without a name: choose by variant={variants[0]!r}, --variant {variants[0]}"
            )
        (variant,) = variants
    if variant not in variants:
        known = ", ".join(name or "plain weights" for name in variants)
        raise ValueError(f"it has no variant {variant!r} of its weights; it has {known}")
    return min((f for f in files if f.variant == variant), key=lambda f: FORMS.index(f.form))


def read_tensors(
    folder: pathlib.Path, file: WeightsFile
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, header) of a file that `choose` chose; of shards one after the other.

    Raises:
      ValueError: a file is missing or damaged, or the index is not that of its shards.
    """
    if not file.is_index:
        return _read(folder / file.name)
    shards = read_index(folder / file.name)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / file.name} names shards that are not there: {few(missing)}")
    for name, tensors in shards.items():
        if name.endswith(".safetensors"):  # a header alone is read: all of them before any tensor
            _compare(folder / name, tensors, tensor_names(folder / name))
    state: dict[str, np.ndarray] = {}
    header: dict[str, str] = {}
    for name, tensors in shards.items():
        shard, its_header = _read(folder / name)
        _compare(folder / name, tensors, shard)
        state |= shard
        header |= its_header
    return state, header


def read_index(path: pathlib.Path) -> dict[str, set[str]]:
    """The tensors of each shard, as an index has them; shards lie beside it.

    Raises:
      ValueError: it is no index, names a tensor twice, or a file elsewhere or of another kind.
    """
    try:
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
        places = index["weight_map"]
        pairs = list(places.items())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of shards, which has a weight_map of tensors and files: {error!r}"
        ) from error
    form = re.search(r"\.(safetensors|bin)\.", path.name)
    shards: dict[str, set[str]] = {}
    for tensor, name in pairs:
        if not isinstance(name, str) or name != re.sub(r".*[/\\:]", "", name):
            raise ValueError(
                f"{path} has {tensor!r} in {name!r}; a shard is named by its bare file name"
            )
        if form is None or not name.endswith(f".{form[1]}"):
            raise ValueError(f"{path} has {tensor!r} in {name!r}, which is no {form and form[1]}")
        shards.setdefault(name, set()).add(tensor)
    if not shards:
        raise ValueError(f"{path} names no tensors")
    return shards


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = load_torch(path)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in state.items()
    ):
        raise ValueError(f"{path} is no state dict of tensors")
    return state, {}


def _compare(path: pathlib.Path, indexed: set[str], there: Iterable[str]) -> None:
    names = set(there)
    if missing := sorted(indexed - names):
        raise ValueError(f"{path} lacks tensors that the index has in it: {few(missing)}")
    if spare := sorted(map(str, names - indexed)):
        raise ValueError(f"{path} holds tensors that the index does not have in it: {few(spare)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no name of which comes twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return content
