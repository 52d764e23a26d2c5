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


def test_crop_is_the_authors_box_for_celeba():
    """Their Crop(x1 = 121 − 64, x2 = 121 + 64, y1 = 89 − 64, y2 = 89 + 64), rows first."""
    image = np.zeros((218, 178, 3), np.uint8)
    image[121, 89] = 255
    cut = crop_resize((57, 25, 128, 128), None)(image)
    assert cut.shape == (128, 128, 3)
    assert (cut[64, 64] == 255).all()


def test_resize_averages_and_takes_the_centre():
    image = np.zeros((4, 8, 1), np.uint8)
    image[:, :4] = 200
    small = crop_resize(None, 2)(image)
    assert small.shape == (2, 2, 1)
    assert abs(int(small[0, 0, 0]) - 200) < 40
    assert int(small[0, 1, 0]) < 40
    assert crop_resize(None, 64)(np.zeros((218, 178, 3), np.uint8)).shape == (64, 64, 3)


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
