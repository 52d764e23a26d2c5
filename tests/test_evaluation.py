"""The Fréchet distance and its moments: closed forms, streaming, files, errors."""

import json
import pickle

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from ddim_jax.evaluation import (
    Moments,
    frechet_distance,
    frechet_jackknife,
    load_moments,
    moments,
    resumable_moments,
    save_moments,
)


def random_moments(rng, dim, rank=None):
    factor = rng.standard_normal((dim, rank or dim))
    return Moments(101, rng.standard_normal(dim), 100 * factor @ factor.T)


@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_against_scipys_matrix_square_root(dim, seed):
    rng = np.random.default_rng(seed)
    a, b = random_moments(rng, dim, dim + 2), random_moments(rng, dim, dim + 2)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    want = ((a.mean - b.mean) ** 2).sum() + np.trace(
        a.covariance + b.covariance - 2 * np.real(root)
    )
    # An eigenvalue of C_a C_b is off by EPS ‖C_a‖ ‖C_b‖; its root, if near 0, by the root of that.
    norms = np.linalg.norm(a.covariance) * np.linalg.norm(b.covariance)
    tolerance = dim * np.sqrt(np.finfo(float).eps * norms)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-12, abs=tolerance)


def test_closed_form_of_commuting_gaussians():
    """Diagonal covariances: Σ (μ_a − μ_b)² + (√v_a − √v_b)²."""
    a = Moments(11, np.array([1.0, 2.0]), 10 * np.diag([4.0, 9.0]))
    b = Moments(21, np.array([0.0, 2.0]), 20 * np.diag([1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 1, rel=1e-12)


def test_singular_covariances_are_no_obstacle():
    rng = np.random.default_rng(0)
    a, b = random_moments(rng, 10, 3), random_moments(rng, 10, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_merged_moments_are_one_shot_moments(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((n, 4)) * 3 + 100 for n in sizes]
    merged = moments(parts[0])
    for part in parts[1:]:
        merged = merged.merge(moments(part))
    whole = np.concatenate(parts)
    # 240 numbers near 100 with a spread of 3: sums off by 240 · 2e-16 of their size.
    np.testing.assert_allclose(merged.mean, whole.mean(axis=0), rtol=1e-10)
    if len(whole) > 1:
        np.testing.assert_allclose(merged.covariance, np.cov(whole.T), rtol=1e-10, atol=1e-10)
    assert merged.size == len(whole)


def test_bad_input():
    with pytest.raises(ValueError, match="shape"):
        moments(np.zeros(3))
    with pytest.raises(ValueError, match="1 rows are not, the first is 2"):
        moments(np.array([[0.0], [1.0], [np.nan]]))
    with pytest.raises(ValueError, match="dimension: 2, 3"):
        frechet_distance(moments(np.eye(2)), moments(np.eye(3)))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(moments(np.ones((1, 2))), moments(np.eye(2)))
    with pytest.raises(ValueError, match="dimension: 2, 3"):
        moments(np.eye(2)).merge(moments(np.eye(3)))
    with pytest.raises(ValueError, match="cannot remove 2 samples from 2"):
        moments(np.eye(2)).remove(moments(np.eye(2)))


def test_general_gaussians_in_closed_form():
    """Means apart by m, covariances R D R^T and R E R^T: |m|² + Σ (√d − √e)²; condition 1e8."""
    rng = np.random.default_rng(0)
    dim = 100
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    d, e = 10 ** rng.uniform(-6, 2, (2, dim))
    mean = rng.standard_normal(dim)
    a = Moments(51, mean, 50 * (rotation * d) @ rotation.T)
    b = Moments(61, 0 * mean, 60 * (rotation * e) @ rotation.T)
    want = mean @ mean + ((np.sqrt(d) - np.sqrt(e)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "dim"), [(20, 30, 200), (150, 40, 100), (3, 2, 64)])
def test_fewer_samples_than_dimensions(n, m, dim):
    """With centred X (n, d) and Y (m, d), tr (C_x C_y)^½ is the nuclear norm of X Y^T, scaled."""
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, dim)), 2 * rng.standard_normal((m, dim)) + 1
    gap = x.mean(axis=0) - y.mean(axis=0)
    cx, cy = x - x.mean(axis=0), y - y.mean(axis=0)
    root = np.linalg.svd(cx @ cy.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    want = gap @ gap + (cx**2).sum() / (n - 1) + (cy**2).sum() / (m - 1) - 2 * root
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_streaming_loses_nothing_far_from_the_origin(offset):
    """In any order of merging, equal to one shot of the centred numbers to 1e-10."""
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((1000, 5)) * 2**20) / 2**20  # exact after the offset
    cuts = [1, 2, 10, 300, 301, 999]
    parts = [moments(part + offset) for part in np.split(x, cuts)]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    pairs = parts
    while len(pairs) > 1:
        odd = pairs[-1:] if len(pairs) % 2 else []
        pairs = [a.merge(b) for a, b in zip(pairs[::2], pairs[1::2])] + odd
    for merged in (left, pairs[0], moments(x + offset)):
        np.testing.assert_allclose(
            merged.mean - offset, x.mean(axis=0), atol=1e-10 * (abs(offset) + 1)
        )
        scale = np.abs(np.cov(x.T)).max()
        np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=0, atol=1e-10 * scale)


def test_remove_undoes_merge():
    rng = np.random.default_rng(0)
    a, b = moments(rng.standard_normal((90, 4)) + 7), moments(rng.standard_normal((10, 4)) * 5)
    left = a.merge(b).remove(b)
    assert left.size == a.size
    np.testing.assert_allclose(left.mean, a.mean, rtol=1e-12)
    np.testing.assert_allclose(left.scatter, a.scatter, rtol=1e-10, atol=1e-10)


# --- standard error ---


def test_the_jackknife_gives_the_spread_over_repetitions():
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 0.5, 2.0])
    standard = Moments(101, np.zeros(3), 100 * np.eye(3))
    draws = [
        frechet_jackknife(rng.standard_normal((400, 3)) * scale + 0.5, standard) for _ in range(400)
    ]
    values, errors = np.array(draws).T
    # 400 repetitions: a standard deviation has a standard error of 1/√800 = 3.5 %; 4 of them.
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.15)
    x = rng.standard_normal((400, 3))
    assert frechet_jackknife(x, standard)[0] == frechet_distance(standard, moments(x))


def test_the_jackknife_of_a_mean_is_the_textbooks():
    """A reference of no spread and two-valued features: leaving out is done by hand."""
    x = np.array([[0.0], [1.0], [1.0], [0.0], [5.0], [2.0]])
    point = Moments(10, np.zeros(1), np.zeros((1, 1)))

    def distance(y):
        return y.mean() ** 2 + y.var(ddof=1)

    drawn = np.random.default_rng(0).permutation(6).reshape(2, 3).T
    kept = [np.delete(x, pair, axis=0) for pair in drawn]
    left_out = np.array([distance(y) for y in kept])
    want = np.sqrt(2 / 3 * ((left_out - left_out.mean()) ** 2).sum())
    assert frechet_jackknife(x, point, blocks=3) == pytest.approx((distance(x), want), rel=1e-12)


def test_the_jackknife_does_not_mind_the_order_of_the_classes():
    """Ten far apart in turn, where every 200th is of one class, or one after the other."""
    x, standard = np.random.default_rng(1).standard_normal((2000, 2)), moments(np.eye(2))
    x[:, 0] += 5 * (np.arange(2000) % 10)
    sorted_ = x[np.argsort(np.arange(2000) % 10, kind="stable")]
    _, mixed = frechet_jackknife(np.random.default_rng(2).permutation(x), standard, 200)
    for order in (
        x,
        sorted_,
    ):  # each error is itself uncertain by 5 %; by strides, 3.2 and 0.08 times
        assert frechet_jackknife(order, standard, 200)[1] == pytest.approx(mixed, rel=0.2)


def test_the_jackknife_needs_samples():
    standard = moments(np.eye(2))
    with pytest.raises(ValueError, match="20 blocks and 39 samples"):
        frechet_jackknife(np.ones((39, 2)), standard)
    with pytest.raises(ValueError, match="blocks >= 2"):
        frechet_jackknife(np.ones((39, 2)), standard, blocks=1)


# --- files ---


def test_saved_by_processes_and_merged(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 6)).astype(np.float32) + 3
    for process in range(3):
        save_moments(tmp_path / f"{process}.npz", moments(x[process::3]), {"process": process})
    loaded = [load_moments(tmp_path / f"{process}.npz") for process in range(3)]
    assert [facts for _, facts in loaded] == [{"process": i} for i in range(3)]
    parts = [part for part, _ in loaded]
    merged, whole = parts[0].merge(parts[1]).merge(parts[2]), moments(x)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-10)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-10)
    other = moments(rng.standard_normal((50, 6)))
    assert frechet_distance(merged, other) == pytest.approx(
        frechet_distance(whole, other), rel=1e-10
    )


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.npz"
    save_moments(path, moments(np.eye(2)))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_moments(path, moments(np.eye(3)))
    assert load_moments(path)[0].size == 2
    save_moments(path, moments(np.eye(3)), overwrite=True)
    assert load_moments(path)[0].size == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    save_moments(path, moments(np.eye(2)))
    unsaveable = Moments(2, np.array([object()]), np.eye(1))  # would need a pickle
    with pytest.raises(ValueError, match="pickle|Object"):
        save_moments(path, unsaveable, overwrite=True)
    with pytest.raises(TypeError, match="JSON"):
        save_moments(path, moments(np.eye(3)), {"a": object()}, overwrite=True)
    assert load_moments(path)[0].size == 2
    assert list(tmp_path.iterdir()) == [path]


def header(**changes):
    facts = {"size": 2, "facts": {}}
    return np.array(json.dumps({"format": 1, "kind": "moments", "facts": facts} | changes))


BAD = {
    "no archive": (b"not an archive", "not an intact"),
    "empty": (b"", "not an intact"),
    "a pickle": (pickle.dumps({"mean": 1}), "not an intact"),
    "a plain array": (np.eye(2), "not an intact"),
    "no header": ({"mean": np.ones(2)}, "no such header"),
    "header of another program": ({"header": np.array("[1]")}, "no such header"),
    "header is no text": ({"header": np.array("{")}, "no such header"),
    "another kind": ({"header": header(kind="reference statistics")}, "holds reference statistics"),
    "a newer format": ({"header": header(format=2)}, "update ddim_jax"),
    "no mean": ({"header": header(), "scatter": np.eye(2)}, "lacks the entry 'mean'"),
    "no size": ({"header": header(facts={"facts": {}})}, "lacks the entry 'size'"),
    "shapes": ({"header": header(), "mean": np.ones(2), "scatter": np.eye(3)}, r"\(3, 3\)"),
    "not finite": (
        {"header": header(), "mean": np.ones(2), "scatter": np.full((2, 2), np.nan)},
        "finite",
    ),
    "float32": (
        {"header": header(), "mean": np.ones(2, np.float32), "scatter": np.eye(2)},
        "mean float32",
    ),
    "objects": ({"header": header(), "mean": np.array([None])}, "not an intact"),
}


@pytest.mark.parametrize(("contents", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused(contents, message, tmp_path):
    path = tmp_path / "bad.npz"
    with open(path, "wb") as file:
        if isinstance(contents, bytes):
            file.write(contents)
        elif isinstance(contents, dict):
            np.savez(file, **contents)
        else:
            np.save(file, contents)
    with pytest.raises(ValueError, match=message):
        load_moments(path)


def test_damage_anywhere_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    save_moments(path, moments(np.eye(8)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not an intact"):
        load_moments(path)
    middle = whole.index(np.eye(8).mean(axis=0).tobytes())
    path.write_bytes(whole[:middle] + b"\1" + whole[middle + 1 :])
    with pytest.raises(ValueError, match="not an intact"):
        load_moments(path)
    with pytest.raises(FileNotFoundError, match="no moments file"):
        load_moments(tmp_path / "absent.npz")


# --- resuming ---


def test_resumed_moments_are_the_same_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    shards = [rng.standard_normal((n, 3)) for n in (5, 1, 8, 4)]
    called = []

    def features(i):
        called.append(i)
        if len(called) == 3:
            raise KeyboardInterrupt
        return shards[i]

    whole = resumable_moments(range(4), lambda i: shards[i], tmp_path / "whole.npz", {"seed": 0})
    with pytest.raises(KeyboardInterrupt):
        resumable_moments(range(4), features, tmp_path / "cut.npz", {"seed": 0})
    assert load_moments(tmp_path / "cut.npz")[0].size == 6
    cut = resumable_moments(range(4), features, tmp_path / "cut.npz", {"seed": 0})
    assert called == [0, 1, 2, 2, 3]
    assert cut.size == whole.size == 18
    np.testing.assert_array_equal(cut.scatter, whole.scatter)
    np.testing.assert_array_equal(cut.mean, np.asarray(whole.mean))
    again = resumable_moments(range(4), features, tmp_path / "cut.npz", {"seed": 0})
    assert called == [0, 1, 2, 2, 3]
    np.testing.assert_array_equal(again.scatter, whole.scatter)

    with pytest.raises(ValueError, match="seed: saved 0, now 1"):
        resumable_moments(range(4), features, tmp_path / "cut.npz", {"seed": 1})
    with pytest.raises(ValueError, match="shards: saved 4, now 5"):
        resumable_moments(range(5), features, tmp_path / "cut.npz", {"seed": 0})
    with pytest.raises(ValueError, match="no shards"):
        resumable_moments([], features, tmp_path / "none.npz")
