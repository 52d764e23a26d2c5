import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddim_jax.pictures.decoding import decode
from ddim_jax.pictures.images import crop_resize, grid, save_png, to_model, to_uint8
from tests.picture_files import deep_png, stored


def test_every_pixel_value_survives_the_round_trip():
    values = np.arange(256, dtype=np.uint8)
    x = to_model(values)
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    np.testing.assert_array_equal(to_uint8(x), values)


def test_values_out_of_range_are_clipped():
    assert to_uint8(jnp.array([-2.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


def test_rounding_is_to_the_nearest_pixel():
    x = np.linspace(-1, 1, 1001)
    pixels = np.asarray(to_uint8(jnp.asarray(x, jnp.float32))).astype(int)
    assert np.abs(pixels - (x + 1) / 2 * 255).max() <= 0.5 + 1e-4


def test_grid_puts_images_in_reading_order():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    tiled = grid(images, columns=3, gap=1, scale=2)
    assert tiled.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
    corners = [int(tiled[1 + 5 * (i // 3), 1 + 5 * (i % 3), 0]) for i in range(5)]
    assert corners == [0, 1, 2, 3, 4]
    assert (tiled[6:, 11:] == 32).all()  # the place without an image


def photograph(height, width):
    """Something with edges, slopes and noise at every scale, another in each channel."""
    r, c = np.mgrid[:height, :width]
    smooth = [3 * r + 2 * c, 5 * c - r + 40, (r - 60) ** 2 // 50 + (c - 90) ** 2 // 40]
    noise = (r * 7919 + c * 104729) % 61
    return np.stack([(channel + noise) % 256 for channel in smooth], -1).astype(np.uint8)


def weights(size, new_size):
    """Rows: the triangle filter around each new pixel's centre, as wide as the reduction."""
    scale = size / new_size
    centres = (np.arange(new_size)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centres) / max(scale, 1)
    filters = np.maximum(1 - distance, 0)
    return filters / filters.sum(1, keepdims=True)


def resampled(image, height, width):
    """Columns, then rows, each rounded to whole grey values."""
    columns = np.einsum("jw,hwc->hjc", weights(image.shape[1], width), image)
    rows = np.einsum("ih,hjc->ijc", weights(image.shape[0], height), np.floor(columns + 0.5))
    return np.floor(rows + 0.5)


def assert_same_picture(image, reference):
    """Equal but for the fixed-point weights of Pillow, which may tip a tie."""
    assert image.shape == reference.shape
    assert np.abs(image - reference).max() <= 1
    assert (image != reference).mean() < 1e-2


def test_crop_is_the_authors_box_for_celeba():
    """Their Crop(x1 = 121 − 64, x2 = 121 + 64, y1 = 89 − 64, y2 = 89 + 64), rows first."""
    image = photograph(218, 178)
    cut = crop_resize((57, 25, 128, 128), None)(image)
    np.testing.assert_array_equal(cut, image[121 - 64 : 121 + 64, 89 - 64 : 89 + 64])


def test_celeba_64_pixels():
    image = photograph(218, 178)
    small = crop_resize((57, 25, 128, 128), 64)(image)
    assert_same_picture(small, resampled(image[57:185, 25:153].astype(float), 64, 64))
    # A reduction by two is the kernel (1, 3, 3, 1) / 8 away from the border: pixel (i, j) sees
    # rows 57 + 2i − 1 .. 57 + 2i + 2.
    i, j = 20, 31
    patch = image[57 + 2 * i - 1 : 57 + 2 * i + 3, 25 + 2 * j - 1 : 25 + 2 * j + 3].astype(float)
    kernel = np.array([1, 3, 3, 1]) / 8
    by_hand = np.einsum("r,c,rck->k", kernel, kernel, patch)
    assert np.abs(small[i, j] - by_hand).max() <= 1
    golden = [[222, 129, 121], [37, 44, 136], [125, 21, 185], [102, 119, 159], [99, 160, 63]]
    assert small[[0, 0, 63, 63, 20], [0, 63, 0, 63, 31]].tolist() == golden
    assert small.sum() == pytest.approx(1503545, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "resized", "corner"),
    [  # the longer side is rounded down; half a pixel of surplus goes to the even side
        ((256, 384), (256, 384), (0, 64)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((500, 317), (403, 256), (74, 0)),  # 403.79; 73.5
                ((317, 500), (256, 403), (0, 74)),
                ((300, 400), (256, 341), (0, 42)),  # 341.33; (341 − 256) / 2 = 42.5
            )
        ),
        ((375, 500), (256, 341), (0, 42)),  # 341.33; (341 − 256) / 2 = 42.5
        ((400, 317), (323, 256), (34, 0)),  # 323.03; 33.5
        ((120, 100), (307, 256), (26, 0)),  # enlarged: 307.2; 25.5
    ],
)
def test_lsun_256_pixels(shape, resized, corner):
    image = photograph(*shape)
    square = crop_resize(None, 256)(image)
    (h, w), (top, left) = resized, corner
    whole = resampled(image.astype(float), h, w)
    assert_same_picture(square, whole[top : top + 256, left : left + 256])
    if shape == (375, 500):
        golden = [[164, 132, 129], [153, 219, 35], [171, 27, 226], [230, 82, 120], [163, 169, 151]]
        assert square[[0, 0, 255, 255, 100], [0, 255, 0, 255, 200]].tolist() == golden
        assert square.sum() == pytest.approx(24852706, rel=1e-5)


def test_grey_images_are_resized_alike():
    image = photograph(50, 60)
    transform = crop_resize((2, 3, 40, 30), 16)
    for channel in range(3):
        grey = transform(image[..., channel : channel + 1])
        np.testing.assert_array_equal(grey[..., 0], transform(image)[..., channel])


def test_a_transform_is_its_parameters():
    transform = crop_resize((1, 2, 3, 4), 5)
    assert transform == crop_resize([1, 2, 3, 4], 5)
    assert hash(transform) == hash(crop_resize([1, 2, 3, 4], 5))
    assert transform != crop_resize((1, 2, 3, 4), 6)
    assert pickle.loads(pickle.dumps(transform)) == transform
    image = photograph(9, 9)
    np.testing.assert_array_equal(crop_resize(None, None)(image), image)


GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
DEEP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
RGB = np.stack([GREY, GREY + 1, 255 - GREY], -1)
TRIPLE = np.repeat(GREY[..., None], 3, -1)
OPAQUE, HOLE = np.full((2, 3), 255, np.uint8), np.where(GREY == 40, 254, 255).astype(np.uint8)


PALETTE = [250, 0, 1, 2, 240, 3, 4, 5, 230, 9, 9, 9, 8, 7, 6, 1, 2, 3]
LOOKED_UP = np.array(PALETTE, np.uint8).reshape(6, 3)[GREY // 40]
CMYK = np.dstack([GREY, GREY // 2, GREY // 3, 255 - GREY])
INK = (255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255


@pytest.mark.parametrize(
    ("content", "expected"),
    {
        "grey": (stored(GREY, "L"), GREY[..., None]),
        "colour": (stored(RGB, "RGB"), RGB),
        "16-bit grey": (stored(DEEP, "I;16"), DEEP[..., None] >> 8),
        "16-bit TIFF": (stored(DEEP, "I;16", "TIFF"), DEEP[..., None] >> 8),
        "16-bit big-endian": (stored(DEEP.astype(">u2"), "I;16B", "TIFF"), DEEP[..., None] >> 8),
        "16-bit colour": (deep_png(RGB * np.uint16(256) + 255), RGB),
        "1 bit": (stored(GREY > 40, "1"), 255 * (GREY > 40)[..., None]),
        "palette": (stored(GREY // 40, "P", palette=PALETTE), LOOKED_UP),
        "GIF": (stored(GREY // 40, "P", "GIF", palette=PALETTE), LOOKED_UP),
        "CMYK": (stored(CMYK, "CMYK", "TIFF"), np.round(INK)),
        "opaque grey": (stored(np.dstack([GREY, OPAQUE]), "LA"), GREY[..., None]),
        "opaque colour": (stored(np.dstack([RGB, OPAQUE]), "RGBA"), RGB),
        "opaque palette": (
            stored(GREY // 40, "P", palette=PALETTE, transparency=b"\xff" * 6),
            LOOKED_UP,
        ),
        "no such transparent grey": (stored(GREY, "L", transparency=41), GREY[..., None]),
        "no such transparent 16 bits": (stored(DEEP, "I;16", transparency=1), DEEP[..., None] >> 8),
        "turned": (stored(GREY, "L", turn=6), np.rot90(GREY, -1)[..., None]),
        "turned 16 bits": (stored(DEEP, "I;16", turn=6), np.rot90(DEEP >> 8, -1)[..., None]),
        "mirrored": (stored(RGB, "RGB", turn=2), RGB[:, ::-1]),
    }.values(),
)
def test_a_picture_of_every_kind_becomes_its_pixels(content, expected):
    pixels = decode(content)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(
        decode(content, 3), np.broadcast_to(expected, (*expected.shape[:2], 3))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stored(np.dstack([GREY, HOLE]), "LA"), "transparent in places"),
        (stored(np.dstack([RGB, HOLE]), "RGBA"), "transparent in places"),
        (stored(GREY // 40, "P", palette=PALETTE, transparency=1), "transparent in places"),
        (stored(GREY, "L", transparency=40), "transparent in places"),
        (stored(RGB, "RGB", transparency=(40, 41, 215)), "transparent in places"),
        (stored(DEEP, "I;16", transparency=257), "transparent in places"),
        (stored(DEEP.astype(np.int32), "I", "TIFF"), "of kind 'I', which have no one meaning"),
        (stored(DEEP.astype(np.float32), "F", "TIFF"), "of kind 'F', which have no one meaning"),
        (stored(RGB, "LAB", "TIFF"), "of kind 'LAB', which have no one meaning"),
    ],
)
def test_a_picture_without_one_meaning_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        decode(content)


def test_colour_is_not_made_grey_but_grey_in_three_channels_is():
    with pytest.raises(ValueError, match="colours where one channel of grey is wanted"):
        decode(stored(RGB, "RGB"), 1)
    np.testing.assert_array_equal(decode(stored(TRIPLE, "RGB"), 1), GREY[..., None])
    with pytest.raises(ValueError, match="channels must be 1, 3 or None, got 4"):
        decode(stored(RGB, "RGB"), 4)


def test_png_is_written_once(tmp_path):
    path = tmp_path / "folder" / "a.png"
    save_png(path, np.zeros((2, 2, 3), np.uint8), text={"seed": "7"})
    with Image.open(path) as image:
        assert image.text == {"seed": "7"}
    with pytest.raises(FileExistsError, match=r"a\.png exists"):
        save_png(path, np.zeros((2, 2, 3), np.uint8))
    save_png(path, np.ones((2, 2, 3), np.uint8), overwrite=True)


def test_bad_input():
    with pytest.raises(TypeError, match="uint8"):
        to_model(jnp.ones(3))
    with pytest.raises(TypeError, match="floats in .*got dtype uint8: are these pixels"):
        to_uint8(np.zeros(3, np.uint8))
    with pytest.raises(TypeError, match="got dtype int64"):
        grid(np.zeros((1, 2, 2, 3), np.int64))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite values"):
            to_uint8(jnp.array([0.0, bad]))
    for pixels in (np.zeros((2, 2), np.int32), np.zeros((2, 2, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"wants uint8 \(H, W, 1 or 3\), got"):
            save_png("no.png", pixels)
    for name in ("columns", "scale"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            grid(np.zeros((1, 2, 2, 3), np.uint8), **{name: 0})
    with pytest.raises(ValueError, match="gap must be >= 0, got -1"):
        grid(np.zeros((1, 2, 2, 3), np.uint8), gap=-1)
    with pytest.raises(ValueError, match="1 or 3"):
        grid(np.zeros((1, 2, 2, 4)))
    with pytest.raises(ValueError, match="does not fit"):
        crop_resize((0, 0, 9, 9), None)(np.zeros((8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        crop_resize(None, 4)(np.zeros((8, 8, 1)))
    for crop in ((-1, 0, 4, 4), (0, 0, 0, 4), (0, 0, 4)):
        with pytest.raises(ValueError, match="crop must be"):
            crop_resize(crop, None)
    with pytest.raises(ValueError, match="resize must be >= 1"):
        crop_resize(None, 0)
