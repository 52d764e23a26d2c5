"""Between pixels and the network's range, and pictures on disk."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ddim_jax.storage.files import write_whole


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

    Raises:
      TypeError: x is not floating: pixels already, perhaps.
      ValueError: a value is NaN or infinite, where x is not traced; traced, NaN becomes 0.

    Example:
      >>> to_uint8(jnp.array([-1.0, 0.1, 7.0]))
      Array([  0, 140, 255], dtype=uint8)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"to_uint8 wants floats in [-1, 1], got dtype {x.dtype}: are these pixels?")
    if not isinstance(x, jax.core.Tracer) and not jnp.isfinite(x).all():
        raise ValueError("to_uint8 wants finite values, got NaN or infinity: they are no pixels")
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class CropResize:
    """A function of one image, made by `crop_resize`: two of the same parameters are equal."""

    crop: tuple[int, int, int, int] | None
    resize: int | None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 1 or 3) -> uint8 (H', W', 1 or 3)."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise ValueError(
                f"crop_resize wants uint8 (H, W, 1 or 3), got {image.dtype} {image.shape}"
            )
        if self.crop is not None:
            top, left, height, width = self.crop
            if top + height > image.shape[0] or left + width > image.shape[1]:
                raise ValueError(f"crop {self.crop} does not fit into an image of {image.shape}")
            image = image[top : top + height, left : left + width]
        if self.resize is None:
            return image
        h, w, channels = image.shape
        shorter = min(h, w)
        h, w = self.resize * h // shorter, self.resize * w // shorter
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        resized = picture.resize((w, h), Image.Resampling.BILINEAR)
        top, left = round((h - self.resize) / 2), round((w - self.resize) / 2)
        return np.asarray(resized).reshape(h, w, channels)[
            top : top + self.resize, left : left + self.resize
        ]


def crop_resize(crop: tuple[int, int, int, int] | None, resize: int | None) -> CropResize:
    """A function that cuts a box out of an image, then makes it a square of `resize` pixels.

    In order: rows top..top+height−1 and columns left..left+width−1 are kept; the shorter side is
    brought to `resize` and the longer to ⌊resize · longer / shorter⌋ by Pillow's bilinear filter,
    a triangle as wide as the reduction (antialiased), columns first, each pass rounded to uint8;
    the centre square is cut out, beginning at half the surplus, a half rounded to the even pixel.
    That is torchvision's Crop, Resize and CenterCrop of PIL images, and with them the DDIM authors'
    preprocessing (`datasets/__init__.py` of github.com/ermongroup/ddim):

    * CelebA 64×64: `crop_resize((57, 25, 128, 128), 64)`. Their Crop(x1=121−64, x2=121+64,
      y1=89−64, y2=89+64) takes x as rows: 57..184 of 218, columns 25..152 of 178; then Resize(64).
    * LSUN 256×256: `crop_resize(None, 256)`. Their Resize(256), CenterCrop(256).

    They flip images at random as well (p = ½, `config.data.random_flip`); that is for training.

    Args:
      crop: (top, left, height, width) in pixels, or None.
      resize: side of the result in pixels, or None to keep the size.

    Returns:
      A `CropResize`, uint8 (H, W, C) → uint8 (H', W', C): comparable, hashable, picklable. It
      raises ValueError where the box leaves the image.

    Raises:
      ValueError: a negative corner, or a size below 1.

    Example:
      >>> celeba = crop_resize((57, 25, 128, 128), 64)
      >>> celeba
      CropResize(crop=(57, 25, 128, 128), resize=64)
      >>> celeba(np.zeros((218, 178, 3), np.uint8)).shape
      (64, 64, 3)
    """
    if crop is not None and (len(crop) != 4 or min(crop) < 0 or min(crop[2:]) < 1):
        raise ValueError(
            f"crop must be (top, left, height, width), corner >= 0 and size >= 1, got {crop}"
        )
    if resize is not None and resize < 1:
        raise ValueError(f"resize must be >= 1 pixel or None, got {resize}")
    box = None if crop is None else (crop[0], crop[1], crop[2], crop[3])
    return CropResize(box, resize)


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
      ValueError: the images are not (n, H, W, 1 or 3) with n ≥ 1, or are not finite; or columns or
        scale is below 1, or gap below 0.

    Example:
      >>> grid(np.zeros((6, 8, 8, 1)), columns=3).shape
      (19, 28, 3)
    """
    pixels = np.asarray(images if images.dtype == np.uint8 else to_uint8(images))
    if pixels.ndim != 4 or pixels.shape[0] < 1 or pixels.shape[3] not in (1, 3):
        raise ValueError(f"images must be (n, H, W, 1 or 3) with n >= 1, got {pixels.shape}")
    n, h, w, _ = pixels.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    for name, number, least in (("columns", columns, 1), ("gap", gap, 0), ("scale", scale, 1)):
        if number < least:
            raise ValueError(f"{name} must be >= {least}, got {number}")
    rows = math.ceil(n / columns)
    pixels = np.broadcast_to(pixels, (n, h, w, 3)).repeat(scale, axis=1).repeat(scale, axis=2)
    h, w = h * scale, w * scale
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 32, np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas


def encode_png(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """uint8 (H, W, 1 or 3) as a PNG file, grey or colour, with facts in it.

    Raises:
      ValueError: the pixels are no such thing.

    Example:
      >>> np.asarray(Image.open(io.BytesIO(encode_png(np.full((1, 2, 1), 7, np.uint8))))).tolist()
      [[7, 7]]
    """
    from PIL.PngImagePlugin import PngInfo

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"a PNG wants uint8 (H, W, 1 or 3), got {pixels.dtype} {pixels.shape}")
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(
    path: str | os.PathLike[str],
    pixels: np.ndarray,
    *,
    text: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write uint8 (H, W, 1 or 3) as PNG.

    Args:
      path: the file to write; its folder is made.
      pixels: uint8 (H, W, 1 or 3).
      text: facts stored in the file, such as the seed.
      overwrite: replace an existing file.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.
      ValueError: the pixels are not uint8 (H, W, 1 or 3).
    """
    save_new(path, encode_png(pixels, text), overwrite)


def save_new(path: str | os.PathLike[str], content: bytes, overwrite: bool = False) -> None:
    """Writes a file, whole, and its folder; FileExistsError where it exists, unless asked to."""
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or ask to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
