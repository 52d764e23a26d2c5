"""Picture files of every kind of pixel."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def stored(pixels, mode, kind="PNG", **options):
    """The file of a picture whose bytes are those of `pixels`."""
    content = np.packbits(pixels, axis=1) if mode == "1" else pixels
    picture = Image.frombytes(mode, pixels.shape[1::-1], content.tobytes())
    if palette := options.pop("palette", None):
        picture.putpalette(palette)
    if turn := options.pop("turn", None):
        options["exif"] = Image.Exif()
        options["exif"][0x112] = turn
    picture.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def deep_png(pixels):
    """A PNG of uint16 (H, W, C), by hand: Pillow writes none of three channels."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
