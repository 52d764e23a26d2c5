"""The weights of the FID's Inception-v3: their names and shapes, their file, its hash."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib

import numpy as np

from ddim_jax.evaluation._layers import (
    Params,
    State,
    checked_state,
    conv_norm_shapes,
    fold_batch_norm,
)
from ddim_jax.storage.files import whole_file

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
EPS = 1e-3

Shapes = dict[str, tuple[int, int, int, int]]  # OIHW


def fetch_inception(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Downloads the weights (96 MB, from pytorch-fid's release on GitHub) unless they are there.

    Args:
      directory: where to put them; it is made.

    Returns:
      The path of the file, for `ddim_jax.evaluation.extractors.inception`.

    Raises:
      ValueError: what was there, or what came, is not the known file; nothing is replaced.
      OSError: the download failed.
    """
    import urllib.error
    import urllib.request

    path = pathlib.Path(directory) / FILE
    if path.exists():
        if (found := file_digest(path)) != SHA256:
            raise ValueError(f"{path} has SHA-256 {found}, not {SHA256}: move it away and retry")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with whole_file(path) as file, urllib.request.urlopen(URL) as response:
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
            if (found := digest.hexdigest()) != SHA256:
                raise ValueError(f"{URL} gave SHA-256 {found}, wanted {SHA256}")
    except urllib.error.URLError as error:
        raise OSError(
            f"cannot download {URL}: {error.reason}; fetch it by other means and pass its path"
        ) from error
    return path


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, in hexadecimal.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"no Inception weights file {path}; fetch_inception(directory) downloads {FILE}"
        )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch weights file, by name; nothing in it is executed.

    Raises:
      ValueError: it is damaged, or holds another network; what is wrong is named.
    """
    from ddim_jax.weights.torch_files import load_torch

    state = load_torch(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return checked_state(path, state, shapes())


def fold(state: State) -> Params:
    """Parameters for `inception.pooled` from PyTorch's arrays; the classes (fc) are left out."""
    return {
        name: fold_batch_norm(state, f"{name}.conv", f"{name}.bn", EPS) for name in conv_shapes()
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all arrays in the file, batch counters aside."""
    arrays: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in conv_shapes().items():
        arrays |= conv_norm_shapes(f"{name}.conv", f"{name}.bn", shape)
    return arrays


@functools.cache
def conv_shapes() -> Shapes:
    """The 94 convolutions (Szegedy et al. 2016, Table 1): name → (out, in, height, width)."""
    stem: Shapes = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }
    blocks = {
        "Mixed_5b": _block_a(192, 32),
        "Mixed_5c": _block_a(256, 64),
        "Mixed_5d": _block_a(288, 64),
        "Mixed_6a": _block_b(288),
        "Mixed_6b": _block_c(768, 128),
        "Mixed_6c": _block_c(768, 160),
        "Mixed_6d": _block_c(768, 160),
        "Mixed_6e": _block_c(768, 192),
        "Mixed_7a": _block_d(768),
        "Mixed_7b": _block_e(1280),
        "Mixed_7c": _block_e(2048),
    }
    return stem | {
        f"{block}.{name}": shape for block, convs in blocks.items() for name, shape in convs.items()
    }


def _block_a(channels: int, pool: int) -> Shapes:
    return {
        "branch1x1": (64, channels, 1, 1),
        "branch5x5_1": (48, channels, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, channels, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pool, channels, 1, 1),
    }


def _block_b(channels: int) -> Shapes:
    return {
        "branch3x3": (384, channels, 3, 3),
        "branch3x3dbl_1": (64, channels, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    }


def _block_c(channels: int, width: int) -> Shapes:
    return {
        "branch1x1": (192, channels, 1, 1),
        "branch7x7_1": (width, channels, 1, 1),
        "branch7x7_2": (width, width, 1, 7),
        "branch7x7_3": (192, width, 7, 1),
        "branch7x7dbl_1": (width, channels, 1, 1),
        "branch7x7dbl_2": (width, width, 7, 1),
        "branch7x7dbl_3": (width, width, 1, 7),
        "branch7x7dbl_4": (width, width, 7, 1),
        "branch7x7dbl_5": (192, width, 1, 7),
        "branch_pool": (192, channels, 1, 1),
    }


def _block_d(channels: int) -> Shapes:
    return {
        "branch3x3_1": (192, channels, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, channels, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    }


def _block_e(channels: int) -> Shapes:
    return {
        "branch1x1": (320, channels, 1, 1),
        "branch3x3_1": (384, channels, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, channels, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, channels, 1, 1),
    }
