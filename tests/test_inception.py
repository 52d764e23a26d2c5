"""The FID's Inception-v3 against a PyTorch assembly of the same layers, and its weights' file."""

import hashlib
import importlib
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.evaluation import extractors, fetch_inception, inception_weights
from ddim_jax.evaluation._layers import conv
from tests import pseudo_weights

inception = importlib.import_module("ddim_jax.evaluation.inception")


@pytest.fixture(scope="module")
def state():
    return pseudo_weights.state(inception_weights.shapes())


def close(got, want, rtol):
    """The largest difference is at most rtol of the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= rtol * np.abs(want).max()


# --- PyTorch: the layers of Szegedy et al. (2016) with the names of the weights file ---


def torch_network():
    """(Inception module of the FID, its blocks by name), in PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's imports
        torch = pytest.importorskip("torch", reason="pip install 'ddim_jax[peers]'")
    nn, F = torch.nn, torch.nn.functional

    class Conv(nn.Module):
        def __init__(self, i, o, kernel, stride=1, padding=0):
            super().__init__()
            self.conv = nn.Conv2d(i, o, kernel, stride, padding, bias=False)
            self.bn = nn.BatchNorm2d(o, eps=1e-3)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    class A(nn.Module):
        def __init__(self, i, pool):
            super().__init__()
            self.branch1x1 = Conv(i, 64, 1)
            self.branch5x5_1, self.branch5x5_2 = Conv(i, 48, 1), Conv(48, 64, 5, 1, 2)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, 64, 1), Conv(64, 96, 3, 1, 1)
            self.branch3x3dbl_3, self.branch_pool = Conv(96, 96, 3, 1, 1), Conv(i, pool, 1)

        def forward(self, x):
            double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            five, pool = self.branch5x5_2(self.branch5x5_1(x)), self.branch_pool(average(x))
            return torch.cat([self.branch1x1(x), five, double, pool], 1)

    class B(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.branch3x3 = Conv(i, 384, 3, 2)
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, 64, 1), Conv(64, 96, 3, 1, 1)
            self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

        def forward(self, x):
            double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
            return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)

    class C(nn.Module):
        def __init__(self, i, c):
            super().__init__()
            wide, tall = (
                {"kernel": (1, 7), "padding": (0, 3)},
                {"kernel": (7, 1), "padding": (3, 0)},
            )
            self.branch1x1, self.branch_pool = Conv(i, 192, 1), Conv(i, 192, 1)
            self.branch7x7_1, self.branch7x7_2 = Conv(i, c, 1), Conv(c, c, **wide)
            self.branch7x7_3 = Conv(c, 192, **tall)
            self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(i, c, 1), Conv(c, c, **tall)
            self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c, c, **wide), Conv(c, c, **tall)
            self.branch7x7dbl_5 = Conv(c, 192, **wide)

        def forward(self, x):
            seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
            double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
            double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
            return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)

    class D(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.branch3x3_1, self.branch3x3_2 = Conv(i, 192, 1), Conv(192, 320, 3, 2)
            self.branch7x7x3_1, self.branch7x7x3_2 = (
                Conv(i, 192, 1),
                Conv(192, 192, (1, 7), 1, (0, 3)),
            )
            self.branch7x7x3_3 = Conv(192, 192, (7, 1), 1, (3, 0))
            self.branch7x7x3_4 = Conv(192, 192, 3, 2)

        def forward(self, x):
            three = self.branch3x3_2(self.branch3x3_1(x))
            seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
            seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
            return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    class E(nn.Module):
        def __init__(self, i, pool):
            super().__init__()
            self.pool = pool
            self.branch1x1, self.branch_pool = Conv(i, 320, 1), Conv(i, 192, 1)
            self.branch3x3_1 = Conv(i, 384, 1)
            self.branch3x3_2a = Conv(384, 384, (1, 3), 1, (0, 1))
            self.branch3x3_2b = Conv(384, 384, (3, 1), 1, (1, 0))
            self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(i, 448, 1), Conv(448, 384, 3, 1, 1)
            self.branch3x3dbl_3a = Conv(384, 384, (1, 3), 1, (0, 1))
            self.branch3x3dbl_3b = Conv(384, 384, (3, 1), 1, (1, 0))

        def forward(self, x):
            y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
            ys, zs = [self.branch3x3_2a(y), self.branch3x3_2b(y)], [self.branch3x3dbl_3a(z)]
            zs.append(self.branch3x3dbl_3b(z))
            return torch.cat([self.branch1x1(x), *ys, *zs, self.branch_pool(self.pool(x))], 1)

    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
            self.Conv2d_2a_3x3 = Conv(32, 32, 3)
            self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, 1)
            self.Conv2d_3b_1x1 = Conv(64, 80, 1)
            self.Conv2d_4a_3x3 = Conv(80, 192, 3)
            self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
            self.Mixed_6a = B(288)
            self.Mixed_6b, self.Mixed_6c = C(768, 128), C(768, 160)
            self.Mixed_6d, self.Mixed_6e = C(768, 160), C(768, 192)
            self.Mixed_7a = D(768)
            self.Mixed_7b = E(1280, average)
            self.Mixed_7c = E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
            self.fc = nn.Linear(2048, 1008)

        def forward(self, pixels):
            """uint8 (n, 3, H, W) → (n, 2048)."""
            x = pixels.to(self.fc.weight.dtype) / 255
            x = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
            x = F.max_pool2d(x, 3, 2)
            for name in inception.BLOCKS:
                x = getattr(self, name)(x)
            return F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]

    return torch, Inception().eval()


@pytest.fixture(scope="module")
def peer(state):
    torch, network = torch_network()
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("tracked")}
    weights = {k: torch.from_numpy(v) for k, v in state.items()}
    network.load_state_dict(weights | counters)  # strict: every name and shape
    return torch, network


@pytest.mark.parametrize("name", inception.BLOCKS)
def test_a_block_against_pytorch(name, state, peer):
    torch, network = peer
    channels = next(s[1] for k, s in inception_weights.conv_shapes().items() if name in k)
    x = pseudo_weights.uniform(name, (2, 9, 8, channels)).astype(np.float32) - 0.5
    with torch.no_grad():
        want = getattr(network, name)(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    params = inception_weights.fold(state)
    layers = inception._layers(params, name + ".")
    got = jax.jit(lambda x: inception.BLOCKS[name](layers, x))(x)
    close(got, want.numpy().transpose(0, 2, 3, 1), 1e-5)


def test_the_network_against_pytorch(state, peer):
    torch, network = peer
    x = pseudo_weights.images("network", (2, 40, 32, 3))
    with torch.no_grad():
        want = network.double()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    network.float()
    close(jax.jit(inception.pooled)(inception_weights.fold(state), x), want.numpy(), 1e-4)


# --- without PyTorch ---


def golden_images():
    """Noise, and noise on the left of black."""
    x = pseudo_weights.images("golden", (2, 32, 32, 3))
    x[1, :, 16:] = 0
    return x


AT = np.arange(8) * 290 + 1
# The PyTorch assembly in float64.
GOLDEN = [
    [0.670233, 0.4690047, 0.2338451, 0.1459503, 0.5881034, 9.6585397, 0.3907764, 1.6553534],
    [1.0560906, 0.6899128, 0.1878587, 0.2454748, 0.6078557, 11.7323441, 0.4990389, 3.181855],
]
GOLDEN_MEAN, GOLDEN_STD = [3.38092358, 4.06667049], [4.78940174, 5.75529389]


def test_golden_features(state):
    x = golden_images()
    got = np.asarray(jax.jit(inception.pooled)(inception_weights.fold(state), x))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[:, AT], GOLDEN, rtol=1e-4)
    np.testing.assert_allclose(got.mean(axis=1), GOLDEN_MEAN, rtol=1e-5)
    np.testing.assert_allclose(got.std(axis=1), GOLDEN_STD, rtol=1e-5)


def bilinear(x, side):
    """(H, W) → (side, side) by the formula, one output pixel at a time, in float64."""
    out = np.empty((side, side))

    def parts(i, size):
        at = min(max((i + 0.5) * size / side - 0.5, 0.0), size - 1)
        low = int(np.floor(at))
        return low, min(low + 1, size - 1), at - low

    for i in range(side):
        top, bottom, v = parts(i, x.shape[0])
        for j in range(side):
            left, right, h = parts(j, x.shape[1])
            upper = (1 - h) * x[top, left] + h * x[top, right]
            lower = (1 - h) * x[bottom, left] + h * x[bottom, right]
            out[i, j] = (1 - v) * upper + v * lower
    return out


@pytest.mark.parametrize("shape", [(32, 32), (8, 11), (299, 299), (400, 320), (1, 2)])
def test_resize_is_the_bilinear_formula(shape):
    """Enlarging and shrinking: no antialiasing, half-pixel centres, edges held."""
    x = pseudo_weights.uniform("resize", shape)
    got = inception.resize(jnp.asarray(x, jnp.float32)[None, :, :, None])
    np.testing.assert_allclose(got[0, :, :, 0], bilinear(x, 299), atol=2e-6)


def test_average_pooling_leaves_the_padding_out():
    x = pseudo_weights.uniform("pool", (1, 4, 5, 2)).astype(np.float32)
    got = inception._average_pool(jnp.asarray(x))
    for i in range(4):
        for j in range(5):
            window = x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            np.testing.assert_allclose(got[0, i, j], window.mean((0, 1)), rtol=1e-6)


def test_the_last_block_alone_pools_by_the_maximum(state):
    """A single bright pixel: its 3 × 3 neighbours see all of it, or a share."""
    params = {
        k: (np.zeros_like(w), np.zeros_like(b))
        for k, (w, b) in inception_weights.fold(state).items()
        if k.startswith("Mixed_7")
    }
    x = np.zeros((1, 5, 5, 2048), np.float32)
    x[0, 2, 2, 0] = 9.0
    for name, size in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        params[f"{name}.branch_pool"][0][0, 0, 0, 0] = 1.0
        out = inception.BLOCKS[name](inception._layers(params, name + "."), x[..., :size])
        assert out[0, 1, 1, 1856] == (9.0 if name == "Mixed_7c" else 1.0)


def test_grey_images_are_taken_three_times(state):
    x = pseudo_weights.images("grey", (1, 8, 8, 1))
    called = jax.eval_shape(inception.pooled, inception_weights.fold(state), x)
    assert called.shape == (1, 2048)
    with pytest.raises(ValueError, match="1 or 3"):
        inception.pooled({}, x.repeat(2, axis=-1))
    small = {"k": (np.ones((3, 3, 3, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32))}
    rgb = conv(small["k"], jnp.ones((1, 3, 3, 3)), padding="VALID")
    assert rgb.item() == 27


def test_the_table_of_shapes_is_the_files():
    """95,628,359 bytes, 566 entries: 94 convolutions of 6 arrays each (one a counter), and fc."""
    shapes = inception_weights.shapes()
    assert len(inception_weights.conv_shapes()) == 94
    assert len(shapes) + 94 == 566
    assert 4 * sum(int(np.prod(s)) for s in shapes.values()) == pytest.approx(95_628_359, rel=2e-3)


# --- the file ---


@pytest.fixture
def files(monkeypatch, tmp_path, state):
    """A weights file whose contents are in `held`, with a stand-in for the reader of it."""
    held = {"state": dict(state)}
    reader = types.ModuleType("ddim_jax.weights.torch_files")
    reader.load_torch = lambda path: held["state"]
    monkeypatch.setitem(sys.modules, "ddim_jax.weights.torch_files", reader)
    path = tmp_path / inception_weights.FILE
    path.write_bytes(b"weights")
    return path, held, hashlib.sha256(b"weights").hexdigest()


def test_only_the_known_file_makes_an_fid(files, monkeypatch):
    path, _, digest = files
    with pytest.raises(ValueError, match=f"{digest}.*6726825d0af5.*allow_unknown"):
        extractors.inception(path)
    other = extractors.inception(path, allow_unknown=True)
    assert other.frechet_name == f"FD-Inception-{digest[:8]}"
    assert other.kernel_name == f"KD-Inception-{digest[:8]}"
    assert (other.dim, other.digest) == (2048, digest)
    monkeypatch.setattr(inception_weights, "SHA256", digest)
    known = extractors.inception(path)
    assert (known.frechet_name, known.kernel_name) == ("FID", "KID")
    assert "FID" not in other._replace(digest="0").frechet_name


def test_batch_counters_are_ignored(files, state):
    path, held, _ = files
    held["state"]["Mixed_5b.branch1x1.bn.num_batches_tracked"] = np.array(0)
    loaded = inception_weights.load_state(path)
    assert loaded.keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, r"fc.weight has shape \(1000, 2048\)"),
        ({"AuxLogits.conv0.conv.weight": np.zeros(1)}, "unknown AuxLogits.conv0.conv.weight"),
        ({"Mixed_7c.branch_pool.bn.bias": None}, "missing Mixed_7c.branch_pool.bn.bias"),
        ({"fc.bias": np.full(1008, np.nan, np.float32)}, "fc.bias is not finite"),
    ],
)
def test_another_network_is_refused(files, change, message):
    path, held, _ = files
    held["state"] = {k: v for k, v in (held["state"] | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        extractors.inception(path, allow_unknown=True)


def test_other_contents_are_refused(files):
    path, held, _ = files
    held["state"] = [1, 2]
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        extractors.inception(path, allow_unknown=True)
    with pytest.raises(FileNotFoundError, match="fetch_inception"):
        extractors.inception(path.parent / "absent.pth")


def test_fetching(tmp_path, monkeypatch):
    source, target = tmp_path / "source.pth", tmp_path / "made" / "here"
    source.write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(inception_weights, "URL", source.as_uri())
    with pytest.raises(ValueError, match="gave SHA-256 .* wanted 6726825d"):
        fetch_inception(target)
    assert list(target.iterdir()) == []

    monkeypatch.setattr(inception_weights, "SHA256", inception_weights.file_digest(source))
    path = fetch_inception(target)
    assert path.name == "pt_inception-2015-12-05-6726825d.pth"
    assert path.read_bytes() == source.read_bytes()
    assert list(target.iterdir()) == [path]
    source.unlink()
    assert fetch_inception(target) == path  # nothing is fetched twice

    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        fetch_inception(target)
    assert path.read_bytes() == b"mine"
    with pytest.raises(OSError, match="cannot download"):
        fetch_inception(tmp_path / "elsewhere")


def test_a_real_torch_file(tmp_path, state):
    pytest.importorskip("ddim_jax.weights.torch_files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="pip install 'ddim_jax[peers]'")
    path = tmp_path / "random.pth"
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, path)
    loaded = inception_weights.load_state(path)
    assert all((loaded[k] == v).all() for k, v in state.items())
