"""One folder of everything that people have in folders: each file read right, or named."""

import io
import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ddim_jax import data
from ddim_jax.data import index
from ddim_jax.data.index import shown
from tests.picture_files import deep_png, stored

SIDE = 8
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
RGB = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
NOISE = RNG.integers(0, 256, (64, 64, 3), np.uint8)  # in files long enough to be cut short
DEEP = RNG.integers(0, 65536, (SIDE, SIDE), np.uint16)
CMYK = RNG.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
INDICES = GREY // 43  # 0..5
PALETTE = RNG.integers(0, 256, 18, np.uint8).tolist()
LOOKED_UP = np.array(PALETTE, np.uint8).reshape(6, 3)[INDICES]
FULL, HOLE = np.full_like(GREY, 255), np.where(GREY > 99, GREY, 255).astype(np.uint8)
TURNS = {  # EXIF's orientation -> what a viewer shows; of the standard, row by row
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


def several(kind, **options):
    """A file of three frames, the first of which is RGB."""
    frames = [Image.fromarray(pixels) for pixels in (RGB, 255 - RGB, RGB // 2)]
    frames[0].save(file := io.BytesIO(), kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def pillow(content, mode="RGB"):
    """What Pillow itself makes of a file that has one meaning."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert(mode))


def enormous():
    """A PNG of 30,000 × 30,000 in 60 bytes, as far as its head says."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


JPEG, GREY_JPEG = (stored(x, m, "JPEG") for x, m in ((RGB, "RGB"), (GREY, "L")))
CMYK_JPEG = stored(CMYK, "CMYK", "JPEG")
GIF, MPO = several("GIF"), several("MPO")
READ = {  # path -> content, its pixels
    "grey.png": (stored(GREY, "L"), GREY),
    "colour.png": (stored(RGB, "RGB"), RGB),
    "1bit.png": (stored(GREY > 99, "1"), 255 * (GREY > 99)),
    "grey16.png": (stored(DEEP, "I;16"), DEEP >> 8),
    "grey16.tif": (stored(DEEP, "I;16", "TIFF"), DEEP >> 8),
    "big-endian16.TIFF": (stored(DEEP.astype(">u2"), "I;16B", "TIFF"), DEEP >> 8),
    "colour16.png": (deep_png(RGB * np.uint16(256) + 77), RGB),
    "palette.png": (stored(INDICES, "P", palette=PALETTE), LOOKED_UP),
    "palette.bmp": (stored(INDICES, "P", "BMP", palette=PALETTE), LOOKED_UP),
    "palette.gif": (stored(INDICES, "P", "GIF", palette=PALETTE), LOOKED_UP),
    "palette-opaque.png": (
        stored(INDICES, "P", palette=PALETTE, transparency=b"\xff" * 6),
        LOOKED_UP,
    ),
    "alpha-opaque.png": (stored(np.dstack([RGB, FULL]), "RGBA"), RGB),
    "grey-alpha-opaque.png": (stored(np.dstack([GREY, FULL]), "LA"), GREY),
    "cmyk.tif": (
        stored(CMYK, "CMYK", "TIFF"),
        np.round((255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255),
    ),
    "cmyk.jpg": (CMYK_JPEG, pillow(CMYK_JPEG)),
    "colour.jpg": (JPEG, pillow(JPEG)),
    "grey.JPEG": (GREY_JPEG, pillow(GREY_JPEG, "L")),
    "colour.bmp": (stored(RGB, "RGB", "BMP"), RGB),
    "colour.webp": (stored(RGB, "RGB", "WEBP", lossless=True), RGB),
    "animated.gif": (GIF, pillow(GIF)),
    "animated.webp": (several("WEBP", lossless=True), RGB),
    "animated.png": (several("PNG"), RGB),
    "several.jpg": (MPO, pillow(MPO)),
    "pages.tif": (several("TIFF"), RGB),
    "a jpeg by another name.png": (JPEG, pillow(JPEG)),
    "a/deep er/one.png": (stored(RGB, "RGB"), RGB),
    "-dash [x]*?%.png": (stored(RGB, "RGB"), RGB),
    "two\nlines.png": (stored(RGB, "RGB"), RGB),
    "猫 é 🐈.png": (stored(RGB, "RGB"), RGB),
    "no text \udcff.png": (stored(RGB, "RGB"), RGB),
    **{f"turned{turn}.png": (stored(RGB, "RGB", turn=turn), to(RGB)) for turn, to in TURNS.items()},
    "turned8.jpg": (stored(RGB, "RGB", "JPEG", turn=8), np.rot90(pillow(JPEG), 1)),
}
CLEAR = {  # path -> content; read with a background
    "alpha.png": stored(np.dstack([RGB, HOLE]), "RGBA"),
    "alpha.webp": stored(np.dstack([RGB, HOLE]), "RGBA", "WEBP", lossless=True, exact=True),
    "grey-alpha.png": stored(np.dstack([GREY, HOLE]), "LA"),
    "palette-alpha.png": stored(INDICES, "P", palette=PALETTE, transparency=b"\xff\x80\x00"),
    "palette-alpha.gif": stored(INDICES, "P", "GIF", palette=PALETTE, transparency=2),
    "key.png": stored(RGB, "RGB", transparency=tuple(RGB[0, 0].tolist())),
    "key16.png": stored(DEEP, "I;16", transparency=int(DEEP[0, 0])),
}


def cut(kind, share=0.5, **options):
    content = stored(NOISE, "RGB", kind, **options)
    return content[: int(len(content) * share)]


REFUSED = {  # path -> content, why
    "zero.png": (b"", "the file is empty"),
    "text.jpg": (b"no picture", "no picture of a kind"),
    "page.png": (b"<!doctype html><p>404", "no picture of a kind"),
    "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture of a kind"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no picture of a kind"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "no picture of a kind"),
    "array.webp": (b"\x93NUMPY\x01\x00", "no picture of a kind"),
    "head.png": (stored(NOISE, "RGB")[:30], "."),
    "cut.png": (cut("PNG"), "truncated|Truncated|broken|not enough"),
    "cut.jpg": (cut("JPEG"), "truncated"),
    "cut.webp": (cut("WEBP", lossless=True), "."),
    "cut.bmp": (cut("BMP"), "truncated"),
    "cut.tif": (cut("TIFF"), "."),
    "cut.gif": (several("GIF")[:60], "."),
    "garbled.png": (stored(NOISE, "RGB").replace(b"IDAT", b"JUNK"), "."),
    "float.tif": (stored(DEEP.astype(np.float32), "F", "TIFF"), "pixels of kind 'F'"),
    "integer.tif": (stored(DEEP.astype(np.int32), "I", "TIFF"), "pixels of kind 'I'"),
    "lab.tif": (stored(RGB, "LAB", "TIFF"), "pixels of kind 'LAB'"),
    "enormous.png": (enormous(), "exceeds limit"),
}
LINKS = {"nothing.png": "a link to nothing", "pipe.png": "no file but a pipe"}
BLOCKED = {"locked.png": "Permission denied", "circle": "a link to a folder that it lies in"}
UNUSABLE = {name: why for name, (_, why) in REFUSED.items()} | LINKS | BLOCKED


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder, and a process that may not read all of it."""
    folder = tmp_path_factory.mktemp("odd")
    files = {name: content for name, (content, _) in {**READ, **REFUSED}.items()} | CLEAR
    for name, content in {**files, "locked.png": stored(RGB, "RGB")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "linked.png").symlink_to(folder / "colour.png")
    (folder / "nothing.png").symlink_to("gone.png")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("of what is here")
    (folder / ".hidden.png").write_bytes(b"of a file manager")
    read = type(folder).read_bytes

    def read_bytes(path):  # root may read what it has locked
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(index.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.setattr(type(folder), "read_bytes", read_bytes)
        yield folder


@pytest.fixture(scope="module")
def message(odd):
    """All that is refused is said in one message."""
    with pytest.raises(ValueError, match="files in .* cannot be used; repair or remove") as error:
        data.load(odd)
    return str(error.value)


def loaded(folder, **options):
    """path -> pixels of what is left when files are left out."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dataset = data.load(folder, on_corrupt="skip", **options)
    names = dataset.read.records.names
    return dict(zip(names, dataset.arrays()["image"])), "\n".join(str(w.message) for w in said)


@pytest.fixture(scope="module")
def read(odd):
    return loaded(odd)


def test_each_file_is_read_or_named(odd, message, read):
    lines = [line[2:].rpartition(": ")[0] for line in message.splitlines()[1:]]
    there = {*READ, *CLEAR, *UNUSABLE, "linked.png"}
    assert len(there) > 60
    assert len(lines) == len(UNUSABLE) + len(CLEAR)
    assert set(read[0]) == {*READ, "linked.png"}
    total = len(there)
    assert message.startswith(f"{len(lines)} of {total} files in {odd} cannot be used")
    assert "notes.txt" not in message
    assert read[1].count("notes.txt") == 1  # no picture by its name, and said
    assert "hidden" not in message + read[1]


@pytest.mark.parametrize("name", READ)
def test_what_has_one_meaning_has_pillows_pixels(read, name):
    expected = np.asarray(READ[name][1])
    expected = expected if expected.ndim == 3 else expected[..., None]
    pixels = read[0][name]
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (SIDE, SIDE, 3)))


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_named_with_its_reason(message, read, name):
    (line,) = [line for line in message.splitlines() if line.startswith(f"  {name}: ")]
    reason = line.removeprefix(f"  {name}: ")
    assert re.search(UNUSABLE[name], reason)
    assert line in read[1]  # and where it is left out, that is said


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_asks_for_a_background(message, name):
    assert f"  {name}: transparent in places: say what is behind it, --data.background" in message


@pytest.fixture(scope="module")
def composed(odd):
    return {colour: loaded(odd, background=colour)[0] for colour in ("white", "#204060")}


@pytest.mark.parametrize("name", CLEAR)
@pytest.mark.parametrize(("colour", "values"), [("white", (255,) * 3), ("#204060", (32, 64, 96))])
def test_what_is_transparent_lies_on_the_background(composed, name, colour, values):
    """(α c + (255 − α) b) / 255; Pillow's own sums are in integers, and within 1 of it."""
    if name == "key16.png":
        grey, alpha = (DEEP >> 8)[..., None].repeat(3, -1), 255 * (DEEP[0, 0] != DEEP)
    else:
        whole = pillow(CLEAR[name], "RGBA")
        grey, alpha = whole[..., :3], whole[..., 3]
    share = alpha[..., None] / 255
    expected = share * grey + (1 - share) * np.array(values)
    assert (alpha < 255).any()
    assert np.abs(composed[colour][name] - expected).max() <= 1


def test_names_are_printable_whatever_their_bytes(message):
    assert shown("two\nlines.png") == "'two\\nlines.png'"
    shown("no text \udcff.png").encode()
    message.encode()


def test_inspection_counts_and_names_all_of_it(odd, message):
    text, sheet = data.inspect(odd)
    for line in message.splitlines()[1:]:
        assert line in text.splitlines()
    assert text.startswith(f"{odd}: {len(READ) + 1} pictures")
    for said in ("5 of JPEG", "upright by EXIF", "by their first frame", "notes.txt", "hidden"):
        assert said in text
    assert sheet.shape[2] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (data.inspect(odd, background="white")[0]).count("transparent") == 1
