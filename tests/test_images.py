import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddim_jax.images import crop_resize, grid, save_png, to_model, to_uint8


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
        ((300, 400), (256, 341), (0, 42)),  # 341.33; (341 − 256) / 2 = 42.5
        ((500, 317), (403, 256), (74, 0)),  # 403.79; 73.5
        ((317, 500), (256, 403), (0, 74)),
        ((375, 500), (256, 341), (0, 42)),
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
