"""Picture files to pixels: each kind of pixel by one rule, or refused."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright
TRANSPARENT = (
    "the picture is transparent in places, and what is behind it is not for a reader to choose: "
    "put it on a background and store it without transparency"
)


class Kind(NamedTuple):
    """What a picture file holds."""

    format: str  # as Pillow says: one of FORMATS, or MPO, a JPEG of several pictures
    mode: str  # of the pixels in the file, as Pillow says: "L", "RGB", "P", "I;16", "CMYK", …
    height: int  # of the picture as it is shown, after EXIF's orientation
    width: int
    channels: int  # 1 if it is grey, else 3
    opaque: bool
    turned: bool  # by EXIF's orientation
    frames: int  # of which the first is read
    coloured: bool  # some pixel is not R = G = B


def decode(
    content: bytes,
    channels: int | None = None,
    background: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """The pixels of a picture file, as Pillow reads it; what has no one meaning is refused.

    * Grey of 1, 2, 4, 8 or 16 bits a pixel spans 0..255; of 16 bits v the upper eight, v >> 8.
    * Palettes are looked up. CMYK, without its profile, is (255 − C) (255 − K) / 255 and so on.
    * Transparency that hides nothing, 255 everywhere, is left out; any other needs a background:
      the pixel is then (α c + (255 − α) b) / 255.
    * The orientation that a camera noted (EXIF) is applied: pictures are as viewers show them.
    * Of several frames it is the first; colour profiles are not applied.

    Args:
      content: of the file, in one of FORMATS.
      channels: 1 or 3, or None where the file decides: 1 if it is grey.
      background: red, green and blue behind what is transparent; None to refuse it.

    Returns:
      uint8 (H, W, channels); grey as three channels has it three times.

    Raises:
      ValueError: no picture (OSError where it is cut short); a pixel that is not opaque, without a
        background; values without a range (32-bit integers and floats) or of another kind (LAB);
        or colour where one channel is wanted.

    Example:
      >>> file = io.BytesIO()
      >>> Image.fromarray(np.array([[0, 65535]], np.uint16)).save(file, "PNG")
      >>> decode(file.getvalue()).tolist()
      [[[0], [255]]]
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels}")
    picture, _ = _read(content)
    if picture.mode in ("LA", "RGBA"):
        if background is None:
            raise ValueError(TRANSPARENT)
        grey = picture.mode == "LA" and len(set(background)) == 1
        ground = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        picture = picture.convert("RGB").getchannel(0) if grey else picture.convert("RGB")
    pixels = np.asarray(picture)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if channels == 1 and pixels.shape[2] == 3:
        if (pixels != pixels[..., :1]).any():
            raise ValueError("the picture has colours where one channel of grey is wanted")
        pixels = pixels[..., :1]
    return np.repeat(pixels, 3, -1) if channels == 3 and pixels.shape[2] == 1 else pixels


def examine(content: bytes) -> Kind:
    """What a picture file holds; all of its first frame is decoded to find it sound.

    Raises:
      ValueError, OSError: as `decode`, but for transparency.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("P", (3, 2)).save(file, "GIF")
      >>> examine(file.getvalue())
      Kind(format='GIF', mode='P', height=2, width=3, channels=3, opaque=True, turned=False, ...)
    """
    return _read(content)[1]


def as_colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of "white", "#fff", "rgb(9,9,9)" and what else Pillow knows.

    Example:
      >>> as_colour("white"), as_colour("#102030")
      ((255, 255, 255), (16, 32, 48))
    """
    try:
        colour: tuple[int, ...] = ImageColor.getrgb(name)
        red, green, blue = colour
    except ValueError:  # also of four numbers, the last of which is transparency
        raise ValueError(
            f"a background is an opaque colour such as white, black or '#808080', got {name!r}"
        ) from None
    return red, green, blue


def _read(content: bytes) -> tuple[Image.Image, Kind]:
    """The first frame, upright, of mode L or RGB, or of LA or RGBA where it is not opaque."""
    if not content:
        raise ValueError("the file is empty")
    try:
        file = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"no picture of a kind that is read ({', '.join(FORMATS)})") from error
    with file:
        mode, format = file.mode, file.format or ""
        sixteen = mode.startswith("I;16") or (mode, format) == ("I", "PNG")
        turned = file.getexif().get(ORIENTATION, 1) in range(2, 9)
        picture, clear = ImageOps.exif_transpose(file), file.info.get("transparency")
        frames = getattr(file, "n_frames", 1)
    if sixteen:  # Pillow 10 calls it I; its own conversion to 8 bits clips at 255
        values = np.asarray(picture)
        picture = Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            picture.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif picture.mode in ("P", "PA") or clear is not None:
        picture = picture.convert("LA" if picture.mode in ("1", "L") else "RGBA")
    elif picture.mode == "RGBa":
        picture = picture.convert("RGBA")
    grey = picture.mode in ("1", "L", "LA")
    if not grey and picture.mode not in ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise ValueError(
            f"the picture has pixels of kind {picture.mode!r}, which have no one meaning in "
            "0..255: store it as 8-bit grey or RGB, or as 16-bit grey"
        )
    clear = picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema() != (255, 255)
    if not clear:
        picture = picture.convert("L" if grey else "RGB")
    width, height = picture.size
    pixels = np.asarray(picture)
    coloured = not grey and bool((pixels[..., 1:3] != pixels[..., :1]).any())
    channels = 1 if grey else 3
    kind = Kind(format, mode, height, width, channels, not clear, turned, frames, coloured)
    return picture, kind
