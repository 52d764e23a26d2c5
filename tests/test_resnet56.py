"""The CIFAR-10 ResNet-56 against a PyTorch assembly, golden numbers, and its published score."""

import importlib
import os
import warnings

import jax
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.evaluation import extractors, features, kernel_distance, shipped_reference
from ddim_jax.evaluation.reference import reference_facts
from ddim_jax.pictures.images import to_uint8
from tests import pseudo_weights

resnet56 = importlib.import_module("ddim_jax.evaluation.resnet56")


@pytest.fixture(scope="module")
def state():
    """Pseudo-random; the second convolution of a block adds little, so that nothing explodes."""
    state = pseudo_weights.state(resnet56.shapes())
    return {k: v * np.float32(0.3 if "bn2.weight" in k else 1) for k, v in state.items()}


def torch_features(state, images):
    """(pooled, logits) by PyTorch in float64, from layers named as the weights are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's imports
        torch = pytest.importorskip("torch", reason="pip install 'ddim_jax[peers]'")
    F = torch.nn.functional
    w = {k: torch.from_numpy(v).double() for k, v in state.items()}

    def conv_norm(x, conv, norm, stride=1):
        x = F.conv2d(x, w[f"{conv}.weight"], None, stride, padding=1)
        mean, var = w[f"{norm}.running_mean"], w[f"{norm}.running_var"]
        return F.batch_norm(x, mean, var, w[f"{norm}.weight"], w[f"{norm}.bias"])

    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double() / 255
    x = (x - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]
    x = F.relu(conv_norm(x, "conv1", "bn1"))
    for stage in (1, 2, 3):
        for i in range(9):
            name, down = f"layer{stage}.{i}", stage > 1 and i == 0
            y = F.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1", 2 if down else 1))
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2")
            if down:
                quarter = y.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = F.relu(x + y)
    pooled = F.avg_pool2d(x, x.shape[-1])[:, :, 0, 0]
    return pooled.numpy(), F.linear(pooled, w["linear.weight"], w["linear.bias"]).numpy()


def close(got, want, rtol):
    want = np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= rtol * np.abs(want).max()


@jax.jit
def both(params, images):
    pooled = resnet56.pooled(params, images)
    return pooled, resnet56.logits(params, pooled)


def test_against_pytorch(state):
    x = pseudo_weights.images("peer", (3, 32, 32, 3))
    for got, want in zip(both(resnet56.fold(state), x), torch_features(state, x)):
        close(np.asarray(got), want, 1e-5)


AT = np.arange(8) * 9
# `torch_features` of pseudo-random weights.
GOLDEN = [
    [
        9.47692,
        4.56202,
        4.67098,
        13.497,
        2.36864,
        19.058,
        2.24063,
        3.60873,
    ],
    [
        9.51898,
        4.82859,
        4.50984,
        13.0911,
        2.98961,
        18.8479,
        2.94004,
        3.5563,
    ],
]
GOLDEN_LOGITS = [
    [-9.82223, 8.12808, -16.7443, -17.6717, 23.5379],
    [-10.0156, 7.7715, -16.9699, -17.6375, 23.6062],
]


def test_golden_features(state):
    x = pseudo_weights.images("golden", (2, 32, 32, 3))
    pooled, logits = map(np.asarray, both(resnet56.fold(state), x))
    close(pooled[:, AT], GOLDEN, 1e-5)
    close(logits[:, :5], GOLDEN_LOGITS, 1e-5)


# --- the published weights ---


WEIGHTS = resnet56.SHIPPED
AGREES, NEAR = 0.6, 0.6  # of 100 images of cifar10-small, S = 20: 0.76 and 0.19 ± 0.10


@pytest.fixture(scope="module")
def cifar10_test():
    if not os.environ.get("DDIM_JAX_DATA"):
        pytest.skip("no CIFAR-10: set DDIM_JAX_DATA")
    from ddim_jax import data

    return data.load("cifar10", "test")


def score(batch, size):
    params = jax.device_put(resnet56.fold(resnet56.load_state(WEIGHTS)))
    extractor = extractors.resnet56()
    pooled = np.concatenate(list(features(extractor, batch["image"], size)))
    predicted = np.asarray(resnet56.logits(params, pooled)).argmax(axis=1)
    return pooled, predicted == batch["label"]


# `torch_features` of the test split's first images.
REAL = [
    [0.590451, 1.0139, 0.456352, 0.227784, 1.30019, 0.216108, 1.00493, 1.10441],
    [0.227976, 0.93685, 0.607999, 0.564779, 0.389397, 0.988981, 1.5189, 2.02557],
    [1.08019, 0.696826, 1.8143, 0.283831, 0.410605, 0.201153, 1.29562, 0.268989],
]


def test_the_published_weights_on_500_images(cifar10_test):
    pooled, right = score(cifar10_test.take(np.arange(500)), 250)
    close(pooled[:3, AT], REAL, 1e-4)
    assert right.sum() == 464
    assert np.flatnonzero(~right)[:8].tolist() == [5, 25, 41, 77, 96, 103, 106, 135]


@pytest.mark.slow
def test_the_published_weights_score_what_they_should(cifar10_test):
    _, right = score(cifar10_test.arrays(), 250)
    assert 100 * right.mean() == pytest.approx(93.39, abs=0.02)


def test_the_reference_that_ships_is_of_the_training_images():
    if not os.environ.get("DDIM_JAX_DATA"):
        pytest.skip("no CIFAR-10: set DDIM_JAX_DATA")
    from ddim_jax import data

    train, extractor = data.load("cifar10", "train"), extractors.resnet56()
    reference = shipped_reference("cifar10", "train", extractor)
    assert reference.facts == reference_facts(train, extractor, keep=2000)
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:2000])[:50]
    found = np.concatenate(list(features(extractor, train.take(chosen)["image"], 50)))
    close(reference.features[:50], found, 1e-4)
    error = reference.features.mean(0) - reference.moments.mean  # of 2,000 among 50,000
    variance = np.diag(reference.moments.covariance) / 2000
    assert (error**2 / variance).mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 64))


@pytest.mark.slow
def test_the_shipped_model_draws_the_classes_asked_for():
    """By this network, which names real test images with 93.39 %; and near to the data."""
    model, extractor = ddim.load_model("cifar10-small"), extractors.resnet56()
    labels = np.arange(100) % 10
    x_T = ddim.initial_noise(jax.random.key(0), 100, model.image_shape)
    sampler = ddim.make_sampler(model, ddim.timesteps(1000, 20))
    images = np.asarray(to_uint8(sampler(x_T, labels=labels)))
    (pooled,) = features(extractor, images)
    params = jax.device_put(resnet56.fold(resnet56.load_state(WEIGHTS)))
    found = np.asarray(resnet56.logits(params, pooled)).argmax(axis=1)
    assert (found == labels).mean() >= AGREES
    kernel = kernel_distance(
        pooled, shipped_reference("cifar10", "train", extractor).features, subset_size=50
    )
    assert kernel.value <= NEAR


def test_names():
    known = extractors.parse_extractor("resnet56")()
    assert (known.frechet_name, known.kernel_name) == ("FD-ResNet56", "KD-ResNet56")
    assert (known.name, known.dim) == ("ResNet56", 64)


def test_other_weights_are_marked(state, tmp_path):
    path = tmp_path / "random.npz"
    np.savez(path, **state)
    digest = resnet56.state_digest(state)
    with pytest.raises(ValueError, match="not hold the known ResNet56 weights.*allow_unknown"):
        extractors.resnet56(path)
    extractor = extractors.resnet56(path, allow_unknown=True)
    assert extractor.frechet_name == f"FD-ResNet56-{digest[:8]}"
    np.savez_compressed(path, **dict(reversed(state.items())))  # another file, the same weights
    assert resnet56.state_digest(resnet56.load_state(path)) == digest
    changed = state | {"linear.bias": state["linear.bias"] + 1}
    assert resnet56.state_digest(changed) != digest


def test_bad_files_and_images(state, tmp_path):
    path = tmp_path / "bad.npz"
    with pytest.raises(FileNotFoundError, match="no ResNet-56 weights"):
        extractors.resnet56(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="not an intact .npz"):
        extractors.resnet56(path)
    np.savez(path, **{k: v for k, v in state.items() if k != "conv1.weight"}, extra=np.ones(1))
    with pytest.raises(ValueError, match="missing conv1.weight, unknown extra"):
        extractors.resnet56(path)
    np.savez(path, **(state | {"conv1.weight": np.array([None])}))  # needs a pickle
    with pytest.raises(ValueError, match="not an intact .npz"):
        extractors.resnet56(path)
    with pytest.raises(ValueError, match=r"\(32, 32, 3\), got \(28, 28, 3\)"):
        resnet56.pooled(resnet56.fold(state), np.zeros((1, 28, 28, 3), np.uint8))
