"""Weights files: exact round trips, half storage, and refusal of everything foreign."""

import json
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy

from ddim_jax.storage.weights_file import HEADER_KEY, load_weights, save_weights

METADATA = {"model": {"channels": 32, "multipliers": [1, 2]}, "note": "ᾱ", "score": 0.25}


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "conv_in": {"kernel": rng.normal(size=(3, 3, 1, 4)).astype(dtype), "bias": np.zeros(4)},
        "down_0": {"block_0": {"scale": np.float32(3), "counts": np.arange(5, dtype=np.int32)}},
        "transposed": rng.normal(size=(4, 6)).astype(dtype).T,
    }


def leaves(tree, prefix=()):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in leaves(sub, (*prefix, key)).items()}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape)
        np.testing.assert_array_equal(a[key], b[key])


def test_round_trip_is_exact(tmp_path):
    save_weights(tmp_path / "w.safetensors", make_params(), METADATA)
    params, metadata = load_weights(tmp_path / "w.safetensors")
    assert_same(params, make_params())
    assert metadata == METADATA
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]  # no temporary left


def test_any_safetensors_reader_sees_named_tensors(tmp_path):
    save_weights(tmp_path / "w", make_params(), METADATA)
    arrays = safetensors.numpy.load_file(tmp_path / "w")
    assert sorted(arrays) == [
        "conv_in/bias",
        "conv_in/kernel",
        "down_0/block_0/counts",
        "down_0/block_0/scale",
        "transposed",
    ]
    np.testing.assert_array_equal(arrays["transposed"], make_params()["transposed"])


def test_float16_halves_the_file_and_returns_float32(tmp_path):
    params = {"w": np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)}
    kept = {"half": np.ones(3, np.float16), "double": np.ones(3)}
    save_weights(tmp_path / "full", params, {})
    save_weights(tmp_path / "half", {**params, **kept}, {}, float16=True)
    assert (tmp_path / "half").stat().st_size < 0.55 * (tmp_path / "full").stat().st_size
    loaded, _ = load_weights(tmp_path / "half")
    assert loaded["w"].dtype == np.float32
    np.testing.assert_allclose(loaded["w"], params["w"], rtol=2.0**-11)  # 10 bits and rounding
    assert_same({k: loaded[k] for k in kept}, kept)


@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_float16_refuses_what_it_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match=r"params/a/b holds .*, which float16 cannot"):
        save_weights(tmp_path / "w", {"a": {"b": np.float32([1, value])}}, {}, float16=True)
    assert not list(tmp_path.iterdir())


def test_overwriting_must_be_asked_for(tmp_path):
    path = tmp_path / "w"
    save_weights(path, {"a": np.zeros(2)}, {})
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_weights(path, {"a": np.ones(2)}, {})
    np.testing.assert_array_equal(load_weights(path)[0]["a"], np.zeros(2))
    save_weights(path, {"a": np.ones(2)}, {}, overwrite=True)
    np.testing.assert_array_equal(load_weights(path)[0]["a"], np.ones(2))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w"
    save_weights(path, {"a": np.zeros(2)}, {})
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, {"a": np.ones(2)}, {}, overwrite=True)
    np.testing.assert_array_equal(load_weights(path)[0]["a"], np.zeros(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "params is an empty dict"),
        ({"a": {"b": {}}}, ValueError, "params/a/b is an empty dict"),
        ({"a/b": np.zeros(1)}, ValueError, "without '/', got 'a/b'"),
        ({3: np.zeros(1)}, ValueError, "got 3"),
        ({"a": {"b": [1, 2]}}, TypeError, "params/a/b must be an array, got list"),
    ],
)
def test_params_that_cannot_be_stored(tmp_path, params, error, message):
    with pytest.raises(error, match=message):
        save_weights(tmp_path / "w", params, {})


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": np.zeros(2)}])
def test_metadata_must_be_json(tmp_path, metadata):
    with pytest.raises((ValueError, TypeError), match=r"JSON"):
        save_weights(tmp_path / "w", {"a": np.zeros(1)}, metadata)


def header_of(content):
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size])


def test_foreign_and_damaged_files_are_named(tmp_path):
    save_weights(tmp_path / "good", make_params(), METADATA)
    content = (tmp_path / "good").read_bytes()
    assert HEADER_KEY in header_of(content)["__metadata__"]
    damaged = {
        "empty": b"",
        "pickle": pickle.dumps({"a": 1}),
        "truncated": content[:-10],
        "header": content[:50],
        "text": b"not weights at all, only words" * 10,
    }
    for name, bad in damaged.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ValueError, match=f"{name} is not an intact safetensors file"):
            load_weights(tmp_path / name)
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other was not written by ddim_jax"):
        load_weights(tmp_path / "other")
    newer = json.dumps({"format": 99, "float16": [], "metadata": {}})
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "newer", {HEADER_KEY: newer})
    with pytest.raises(ValueError, match="format 99, this version reads up to 1: update"):
        load_weights(tmp_path / "newer")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_weights(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_weights(tmp_path)
