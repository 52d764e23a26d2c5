"""Extractors, cached references and the figures' names."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax import data
from ddim_jax.evaluation import (
    Extractor,
    evaluate,
    extractors,
    features,
    frechet_distance,
    frechet_jackknife,
    kernel_distance,
    load_reference,
    moments,
    precision_recall,
    reference_statistics,
    save_moments,
)
from ddim_jax.evaluation import inception_weights as weights
from ddim_jax.pictures.images import to_model, to_uint8

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 4, 3, 1), dtype=np.uint8)


def collection(images=IMAGES, name="noise", split="train", read=None):
    def take(i):
        return images[i], np.zeros(len(i), np.int32)

    shape = images.shape[1:]
    facts = {"name": name, "split": split}
    return data.Dataset(name, split, len(images), shape, None, facts, read or take)


def spy(extractor, sizes):
    """The same extractor, noting how many images each call gets."""

    def apply(images):
        sizes.append(len(images))
        return extractor.apply(images)

    return extractor._replace(apply=apply)


# --- features ---


@pytest.mark.parametrize("batch_size", [1, 7, 60, 100])
@pytest.mark.parametrize("cuts", [[], [1], [20, 20, 59]])
def test_features_do_not_depend_on_shards_or_batches(batch_size, cuts):
    sizes = []
    shards = iter(np.split(IMAGES, cuts)) if cuts else IMAGES
    out = list(features(spy(extractors.pixels(), sizes), shards, batch_size))
    assert set(sizes) == {batch_size}  # one shape, so a network is compiled once
    whole = np.concatenate(out)
    assert whole.dtype == np.float32
    want = IMAGES.reshape(60, 12) / 127.5 - 1
    np.testing.assert_allclose(whole, want, atol=1e-6)


def test_features_are_taken_one_batch_at_a_time():
    """An endless iterable is no obstacle to whoever stops."""

    def endless():
        while True:
            yield IMAGES

    stream = features(extractors.pixels(), endless(), 50)
    assert [len(next(stream)) for _ in range(3)] == [50, 50, 50]


def test_images_in_the_models_range_become_pixels_by_one_rounding():
    x = jnp.linspace(-1.1, 1.1, 48).reshape(4, 2, 2, 3)
    with pytest.raises(TypeError, match=r"float32.*ddim_jax\.pictures\.images\.to_uint8"):
        list(features(extractors.pixels(), np.asarray(x)))
    got = np.concatenate(list(features(extractors.pixels(), [np.asarray(to_uint8(x))])))
    want = np.clip(np.round((np.asarray(x, np.float64) + 1) * 127.5), 0, 255) / 127.5 - 1
    np.testing.assert_allclose(got, want.reshape(4, 12), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "no images"),
        ([IMAGES[:0]], ValueError, "no images"),
        (IMAGES[0], ValueError, r"\(n, H, W, C\), got \(4, 3, 1\)"),
        ([IMAGES, IMAGES[:, :2]], ValueError, r"one shape, got \(4, 3, 1\) and \(2, 3, 1\)"),
        (IMAGES.astype(np.int64), TypeError, "int64"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        list(features(extractors.pixels(), images))


def test_an_extractor_must_keep_its_word():
    wrong = Extractor("wrong", 3, "", "none", lambda images: np.zeros((len(images), 4)))
    with pytest.raises(ValueError, match=r"wrong was to give \(60, 3\) features, got \(60, 4\)"):
        list(features(wrong, IMAGES))
    with pytest.raises(ValueError, match="batch_size"):
        features(wrong, IMAGES, batch_size=0)


@pytest.mark.parametrize("digest", ["", "6726825d", weights.SHA256[:-1] + "3"])
@pytest.mark.parametrize("name", ["Inception", "FID", "ResNet56"])
def test_no_name_earns_the_title(name, digest):
    """Only the whole hash of the weights does."""
    extractor = extractors.pixels()._replace(name=name, digest=digest)
    assert (extractor.frechet_name, extractor.kernel_name) == (f"FD-{name}", f"KD-{name}")
    real = extractor._replace(digest=weights.SHA256)
    assert (real.frechet_name, real.kernel_name) == ("FID", "KID")


def test_the_jackknife_says_how_far_it_is():
    ticks = []
    x = RNG.standard_normal((40, 3))
    frechet_jackknife(x, moments(x + 1), 8, lambda: ticks.append(1))
    assert len(ticks) == 8


# --- references ---


def test_a_reference_is_the_statistics_of_all_images(tmp_path):
    path = tmp_path / "r.npz"
    sizes = []
    extractor = spy(extractors.pixels(), sizes)
    made = reference_statistics(path, collection(), extractor, keep=25, batch_size=8, save_every=20)
    x = np.float64(np.float32(IMAGES.reshape(60, 12)) / np.float32(127.5) - 1)
    assert made.moments.size == 60
    np.testing.assert_allclose(made.moments.mean, x.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(made.moments.covariance, np.cov(x.T), rtol=1e-10, atol=1e-10)
    rows = {row.tobytes() for row in x.astype(np.float32)}
    kept = {row.tobytes() for row in made.features}
    assert made.features.shape == (25, 12)
    assert len(kept) == 25
    assert kept < rows
    assert kept != {row.tobytes() for row in x[:25].astype(np.float32)}
    assert list(tmp_path.iterdir()) == [path]

    del sizes[:]
    again = reference_statistics(path, collection(), extractor, keep=25)
    assert not sizes
    np.testing.assert_array_equal(again.features, made.features)
    np.testing.assert_array_equal(load_reference(path).moments.scatter, made.moments.scatter)


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_killed_computation_continues(cut, tmp_path):
    """Killed at the `cut`-th reading of images: the finished parts are not read again."""
    whole = reference_statistics(
        tmp_path / "whole.npz", collection(), extractors.pixels(), batch_size=10, save_every=20
    )
    seen = []

    def read(i):
        if len(i) == 10:  # a batch, not the look at 16 images
            if len(seen) == cut:
                seen.append("killed")
                raise KeyboardInterrupt
            seen.append(int(i[0]))
        return IMAGES[i], np.zeros(len(i), np.int32)

    arguments = (tmp_path / "cut.npz", collection(read=read), extractors.pixels())
    with pytest.raises(KeyboardInterrupt):
        reference_statistics(*arguments, batch_size=10, save_every=20)
    assert not (tmp_path / "cut.npz").exists()
    resumed = reference_statistics(*arguments, batch_size=10, save_every=20)
    assert seen[cut + 1] == 20 * (cut // 2)
    np.testing.assert_array_equal(resumed.moments.scatter, whole.moments.scatter)
    np.testing.assert_array_equal(resumed.moments.mean, whole.moments.mean)
    np.testing.assert_array_equal(resumed.features, whole.features)
    assert resumed.facts == whole.facts
    assert not (tmp_path / "cut.npz.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": collection(split="test")}, "data.split: saved 'train', now 'test'"),
        ({"dataset": collection(IMAGES[:50])}, "number: saved 60, now 50"),
        ({"dataset": collection(IMAGES[:, ::-1])}, "pixels: saved"),
        ({"dataset": collection(IMAGES.reshape(60, 3, 4, 1))}, "image_shape.*4, 3, 1.*3, 4, 1"),
        ({"keep": 30}, "kept: saved 60, now 30"),
        ({"extractor": extractors.pixels()._replace(digest="ab")}, "digest: saved '', now 'ab'"),
        ({"extractor": extractors.pixels()._replace(name="other")}, "'pixels', now 'other'"),
        ({"extractor": extractors.pixels()._replace(preprocessing="v")}, "preprocessing: "),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_another_provenance_is_an_error_that_shows_the_difference(
    change, message, partial, tmp_path
):
    path = tmp_path / "r.npz"
    usual = {"dataset": collection(), "extractor": extractors.pixels(), "keep": 100}
    reference_statistics(path, **usual)
    if partial:
        path.rename(tmp_path / "r.npz.partial")
    with pytest.raises(ValueError, match=message) as caught:
        reference_statistics(path, **usual | change)
    assert "facts" not in str(caught.value)
    unchanged = {"number", "image_shape", "kept", "extractor:", "digest"} - set(message.split(":"))
    assert sum(word in str(caught.value) for word in unchanged) <= 2


def test_bad_references(tmp_path):
    path = tmp_path / "r.npz"
    with pytest.raises(FileNotFoundError, match="no reference statistics file"):
        load_reference(path)
    with pytest.raises(ValueError, match="keep must be >= 2"):
        reference_statistics(path, collection(), extractors.pixels(), keep=1)
    save_moments(path, moments(np.eye(2)))
    with pytest.raises(ValueError, match="holds moments, not reference statistics"):
        load_reference(path)
    with pytest.raises(ValueError, match="holds moments"):
        reference_statistics(path, collection(), extractors.pixels())
    made = reference_statistics(tmp_path / "good.npz", collection(), extractors.pixels())
    json.dumps(made.facts)
    with np.load(tmp_path / "good.npz") as file:
        contents = dict(file)
    np.savez(path, **contents | {"features": contents["features"][:, :5]})
    with pytest.raises(ValueError, match=r"no valid reference.*\(m, 12\)"):
        load_reference(path)


# --- all together ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    return reference_statistics(path, data.load("digits"), extractors.pixels())


def test_figures_are_those_of_the_functions(digits):
    images = data.load("digits").arrays()["image"]
    samples = np.clip(images[:900].astype(int) + 20, 0, 255).astype(np.uint8)
    result = evaluate(iter(np.split(samples, [10, 500])), digits, extractors.pixels(), manifold=400)
    x, y = (np.asarray(to_model(z)).reshape(len(z), -1) for z in (samples, images))
    assert result.frechet.value == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-6)
    kernel = kernel_distance(x, y, subset_size=90)
    assert result.kernel[1:] == pytest.approx((kernel.value, kernel.se))
    assert result.facts["kernel_subsets"] == 10
    every = evaluate(samples, digits, extractors.pixels(), manifold=900, blocks=0, seed=1)
    order = np.random.default_rng(1)
    generated, real = x[order.permutation(900)], y[order.permutation(1797)[:900]]
    assert (every.precision.value, every.recall.value) == precision_recall(real, generated)
    assert 0.5 < result.precision.value <= 1
    assert (result.size, result.reference_size) == (900, 1797)
    assert 0 < result.frechet.se < result.frechet.value


def test_every_figure_carries_its_name(digits):
    samples = data.load("digits").arrays()["image"][:200]
    result = evaluate(samples, digits, extractors.pixels(), blocks=0)
    assert result.frechet.se is None
    assert [figure.name for figure in result[:4]] == [
        "FD-pixels",
        "KD-pixels",
        "precision-pixels",
        "recall-pixels",
    ]
    assert str(result).startswith("FD-pixels ")
    assert str(result).endswith("(200 samples)")
    saved = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert saved["frechet"]["name"] == "FD-pixels"
    assert saved["reference"]["data"]["name"] == "digits"
    assert (saved["size"], saved["extractor"], saved["manifold"]) == (200, "pixels", 200)


def test_samples_and_reference_must_fit(digits):
    samples = data.load("digits").arrays()["image"]
    with pytest.raises(ValueError, match=r"another extractor:\n  digest: saved '', now 'a'"):
        evaluate(samples, digits, extractors.pixels()._replace(digest="a"))
    with pytest.raises(ValueError, match=r"\(8, 8, 1\) each, like the reference, got \(1797, 4"):
        evaluate(samples[:, ::2, ::2], digits, extractors.pixels())
    with pytest.raises(TypeError, match="to_uint8"):
        evaluate(np.asarray(to_model(samples)), digits, extractors.pixels())
    with pytest.raises(ValueError, match="20 blocks and 30 samples"):
        evaluate(samples[:30], digits, extractors.pixels())
