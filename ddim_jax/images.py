"""Between pixels and the network's range, and pictures on disk."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


def to_model(images: jax.Array | np.ndarray) -> jax.Array:
    """Pixels to the network's range: x = v / 127.5 − 1.

    Args:
      images: uint8 array of any shape, values v in 0..255.

    Returns:
      float32 array of the same shape in [−1, 1].

    Raises:
      TypeError: the images are not uint8.

    Example:
      >>> to_model(np.array([0, 255], np.uint8))
      Array([-1.,  1.], dtype=float32)
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"to_model wants uint8 images in 0..255, got dtype {images.dtype}")
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array | np.ndarray) -> jax.Array:
    """The network's range to pixels: v = round(127.5 (x + 1)), clipped to 0..255.

    Args:
      x: float array of any shape; finite values outside [−1, 1] are clipped.

    Returns:
      uint8 array of the same shape; `to_uint8(to_model(v)) == v` for every v.

    Example:
      >>> to_uint8(jnp.array([-1.0, 0.1, 7.0]))
      Array([  0, 140, 255], dtype=uint8)
    """
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def crop_resize(
    crop: tuple[int, int, int, int] | None, side: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that cuts a box out of an image, then makes it a square of `side` pixels.

    The shorter side is brought to `side` by Pillow's bilinear filter with antialiasing, and the
    centre square is cut out: what torchvision's Resize and CenterCrop do. For CelebA the DDIM
    authors take crop (57, 25, 128, 128) and side 64; for LSUN no crop, and side 256.

    Args:
      crop: (top, left, height, width) in pixels, or None.
      side: of the result, or None to keep the size.

    Returns:
      uint8 (H, W, C) → uint8 (H', W', C); ValueError where the box leaves the image.

    Example:
      >>> crop_resize((57, 25, 128, 128), 64)(np.zeros((218, 178, 3), np.uint8)).shape
      (64, 64, 3)
    """

    def transform(image: np.ndarray) -> np.ndarray:
        if crop is not None:
            top, left, height, width = crop
            if min(crop) < 0 or top + height > image.shape[0] or left + width > image.shape[1]:
                raise ValueError(f"crop {crop} does not fit into an image of {image.shape}")
            image = image[top : top + height, left : left + width]
        if side is None:
            return image
        h, w, channels = image.shape
        size = (round(w * side / min(h, w)), round(h * side / min(h, w)))
        pixels = Image.fromarray(image[..., 0] if channels == 1 else image)
        image = np.asarray(pixels.resize(size, Image.Resampling.BILINEAR)).reshape(
            size[1], size[0], channels
        )
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        return image[top : top + side, left : left + side]

    return transform


def grid(images: Any, columns: int | None = None, gap: int = 1, scale: int = 1) -> np.ndarray:
    """Tile images, row by row, on a dark ground.

    Args:
      images: (n, H, W, C) with C = 1 or 3; uint8, or floating in [−1, 1].
      columns: images in a row; ⌈√n⌉ by default.
      gap: pixels between images.
      scale: each pixel becomes scale × scale.

    Returns:
      uint8 (H', W', 3).

    Raises:
      ValueError: the images are not (n, H, W, 1 or 3) with n ≥ 1.

    Example:
      >>> grid(np.zeros((6, 8, 8, 1)), columns=3).shape
      (19, 28, 3)
    """
    pixels = np.asarray(images if images.dtype == np.uint8 else to_uint8(images))
    if pixels.ndim != 4 or pixels.shape[0] < 1 or pixels.shape[3] not in (1, 3):
        raise ValueError(f"images must be (n, H, W, 1 or 3) with n >= 1, got {pixels.shape}")
    n, h, w, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    pixels = np.broadcast_to(pixels, (n, h, w, 3)).repeat(scale, axis=1).repeat(scale, axis=2)
    h, w = h * scale, w * scale
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 32, np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas


def save_png(
    path: str | os.PathLike[str],
    pixels: np.ndarray,
    *,
    text: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write uint8 (H, W, 3) as PNG.

    Args:
      path: the file to write; its folder is made.
      pixels: uint8 (H, W, 3).
      text: facts stored in the file, such as the seed.
      overwrite: replace an existing file.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.
    """
    from PIL.PngImagePlugin import PngInfo

    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or ask to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=info)
