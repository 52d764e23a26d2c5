"""Training: the update against float64 NumPy, closed forms, exact resume, divergence, export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ddim_jax as ddim
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.prediction import from_x0_eps, to_x0_eps
from ddim_jax.process.schedule import schedule_from_alpha_bar
from ddim_jax.training import step as training
from ddim_jax.training.step import init_state, make_train_step
from tests.tiny import SCHEDULE, affine, affine_params, make_batch, make_config

# The step.


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("grad_clip", [0.05, 1e6])
def test_the_update_is_clipped_warmed_up_adam_with_a_moving_average(monkeypatch, grad_clip, decay):
    def toy_loss(denoise, schedule, x_0, key, gamma, *, indices):  # least squares: no noise, no t
        error = denoise(x_0, jnp.ones(x_0.shape[:1], jnp.int32)) - 0.3
        return (error * error).mean()

    monkeypatch.setattr(training, "loss", toy_loss)
    config = make_config(
        grad_clip=grad_clip,
        ema_decay=0.8,
        adam_b1=0.8,
        adam_b2=0.95,
        num_updates=40,
        cosine_decay=decay,
    )
    step = make_train_step(lambda p, x, t, _: affine(p, x, t), SCHEDULE, config)
    state = init_state(affine_params(), config)

    theta, ema = np.array([0.5, -0.25]), np.array([0.5, -0.25])
    m, v = np.zeros(2), np.zeros(2)
    for n in range(1, 41):
        batch = make_batch(8, seed=n)
        state, metrics = step(state, batch)

        x = batch["image"] / 255 * 2 - 1
        error = theta[0] * x + theta[1] - 0.3
        grad = np.array([(2 * error * x).mean(), (2 * error).mean()])
        norm = np.sqrt((grad**2).sum())
        np.testing.assert_allclose(metrics["loss"], (error**2).mean(), rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
        grad *= min(1, grad_clip / norm)
        m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
        rate = 0.01 * min(1, n / 5) * (np.cos(np.pi * (n - 1) / 40) / 2 + 0.5 if decay else 1)
        theta = theta - rate * (m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8)
        kept = min(0.8, n / (9 + n))
        ema = kept * ema + (1 - kept) * theta
        np.testing.assert_allclose([state.params["w"], state.params["b"]], theta, atol=2e-5)
        np.testing.assert_allclose([state.ema["w"], state.ema["b"]], ema, atol=2e-5)
    assert int(state.step) == 40
    assert np.abs(theta - [0.5, -0.25]).max() > 0.1  # it went somewhere


@pytest.mark.slow
def test_training_finds_the_optimal_linear_denoiser():
    """Pixels ±1 have mean 0 and variance 1, so the best ε(x, t) = w_t x has w_t = √(1 − ᾱ_t)."""
    alpha_bar = np.array([1, 0.8, 0.4, 0.05])
    config = make_config(learning_rate=0.02, warmup_steps=0, ema_decay=0.99)

    def apply_fn(params, x, t, dropout_key=None):
        return params["w"][t - 1][:, None, None, None] * x

    step = make_train_step(apply_fn, schedule_from_alpha_bar(alpha_bar), config)
    state = init_state({"w": jnp.zeros(3)}, config)
    rng = np.random.default_rng(0)
    for _ in range(600):
        images = rng.integers(0, 2, (64, 8, 8, 1)).astype(np.uint8) * 255
        state, _ = step(state, {"image": images, "label": np.zeros(64, np.int32)})
    np.testing.assert_allclose(state.ema["w"], np.sqrt(1 - alpha_bar[1:]), atol=0.02)


@pytest.mark.parametrize(
    ("kind", "gamma"),
    [
        ("eps", "one"),
        pytest.param("x_0", "min-snr-5", marks=pytest.mark.slow),
        pytest.param("v", "one", marks=pytest.mark.slow),
        ("edm", "edm"),
    ],
)
def test_every_objective_learns_to_the_loss_of_the_exact_denoiser(kind, gamma):
    """Of images N(μ, s² I) the exact denoiser is affine, with t-by-t mean squared errors

    a²s²/(a²s² + b²) for ε, s²b²/(a²s² + b²) for x_0, s²/(a²s² + b²) for v, and that of x_0 over
    c_out² = b²/(a² + 4b²) for F at σ_d = ½; a² = ᾱ_t, b² = 1 − ᾱ_t.
    """
    rng = np.random.default_rng(0)
    draw = lambda n: np.clip(rng.normal(150, 40, (n, 4, 4, 1)).round(), 0, 255).astype(np.uint8)  # noqa: E731
    held_out = draw(16_384)
    mean, variance = (held_out / 127.5 - 1).mean(), (held_out / 127.5 - 1).var()
    config = make_config(
        prediction=kind,
        gamma=gamma,
        learning_rate=0.03,
        num_updates=400,
        cosine_decay=True,
        ema_decay=0.98,
    )

    def apply_fn(params, x, t, dropout_key=None):
        w, b = (params[name][t - 1][:, None, None, None] for name in ("w", "b"))
        return w * x + b

    step = make_train_step(apply_fn, SCHEDULE, config)
    state = init_state({"w": jnp.zeros(10), "b": jnp.zeros(10)}, config)
    for _ in range(config.num_updates):
        state, _ = step(state, {"image": draw(256), "label": np.zeros(256, np.int32)})

    exact_eps = ddim.oracle.gaussian(SCHEDULE, mean, variance)

    def exact(x, t):
        c = coefficients(SCHEDULE, t, t * 0)
        if kind == "edm":  # fed x_t over its deviation for σ_d = ½
            x = x * jnp.sqrt(c.sqrt_alpha_bar_t**2 / 4 + c.sqrt_one_minus_alpha_bar_t**2).reshape(
                -1, 1, 1, 1
            )
        return from_x0_eps(c, *to_x0_eps(c, x, exact_eps(x, t)), kind)

    @jax.jit
    def losses(key, images):
        trained = lambda x, t: apply_fn(state.ema, x, t)  # noqa: E731
        both = (ddim.predicts(f, kind, schedule=SCHEDULE) for f in (trained, exact))
        return jnp.stack([ddim.loss(f, SCHEDULE, images, key, weights) for f in both])

    weights = ddim.find_gamma(gamma)(SCHEDULE, ddim.Prediction(kind))

    keys = jax.random.split(jax.random.key(1), 64)
    parts = zip(keys, np.split((held_out / 127.5 - 1).astype(np.float32), 64))
    trained, best = np.array([losses(*part) for part in parts]).T
    error = best.std(ddof=1) / np.sqrt(64)
    a2 = np.asarray(SCHEDULE.alpha_bar, np.float64)[1:]
    factor = {"eps": a2 * variance, "x_0": (1 - a2) * variance, "v": variance,
              "edm": variance * (a2 + 4 * (1 - a2))}[kind]  # fmt: skip
    least = weights[1:] * factor / (a2 * variance + 1 - a2)
    assert abs(best.mean() - least.mean()) < 3 * error
    assert abs(trained.mean() - best.mean()) < error


def test_a_network_that_predicts_something_else_is_refused():
    with pytest.raises(ValueError, match="predict"):
        make_train_step(ddim.predicts(affine, "x_0"), SCHEDULE, make_config(prediction="v"))


def too_short(schedule, prediction):
    return np.ones(schedule.num_steps)


def twice(schedule, prediction):
    return np.full(schedule.num_steps + 1, 2.0)


def test_a_gamma_of_ones_own(monkeypatch):
    def first_loss(gamma):
        step = make_train_step(affine, SCHEDULE, make_config(gamma=gamma))
        return float(step(init_state(affine_params(), make_config()), make_batch(8))[1]["loss"])

    assert first_loss("tests.test_training:twice") == pytest.approx(2 * first_loss("one"))
    with pytest.raises(ValueError, match=r"must return \(T\+1,\) = \(11,\) weights"):
        first_loss("tests.test_training:too_short")


def test_eps_is_not_learned_at_zero_terminal_snr():
    zero = ddim.rescale_zero_terminal_snr(SCHEDULE)
    with pytest.raises(ValueError, match='use a network that predicts "v", "x_0" or "edm"'):
        make_train_step(affine, zero, make_config())
    make_train_step(affine, zero, make_config(prediction="v"))


def test_randomness_is_a_function_of_seed_and_step():
    steps = {seed: make_train_step(affine, SCHEDULE, make_config(seed=seed)) for seed in (0, 1)}

    def first_loss(seed, n):
        state = init_state(affine_params(), make_config())._replace(step=jnp.int32(n))
        return float(steps[seed](state, make_batch(8))[1]["loss"])

    losses = {(seed, n): first_loss(seed, n) for seed in (0, 1) for n in (0, 1)}
    assert len(set(losses.values())) == 4
    assert all(first_loss(*key) == value for key, value in losses.items())


@pytest.mark.parametrize("flip", [False, True])
def test_flips_mirror_half_of_the_images(monkeypatch, flip):
    # Each image is black on its left half and white on its right: mirrored or not shows in ±1.
    images = np.zeros((64, 2, 4, 1), np.uint8)
    images[:, :, 2:] = 255

    def toy_loss(denoise, schedule, x_0, key, gamma, *, indices):
        side = jnp.array([-1.0, -1.0, 1.0, 1.0])[None, None, :, None]
        return (x_0 * side).mean() + 0.0 * denoise(x_0, jnp.ones(64, jnp.int32)).mean()

    monkeypatch.setattr(training, "loss", toy_loss)
    config = make_config(flip=flip)
    step, state = make_train_step(affine, SCHEDULE, config), init_state(affine_params(), config)
    means = []
    for _ in range(40):
        state, metrics = step(state, {"image": images, "label": np.zeros(64, np.int32)})
        means.append(float(metrics["loss"]))
    if not flip:
        assert set(means) == {1.0}
    else:  # the mean of 64 fair ±1 has standard deviation 1/8
        assert abs(np.mean(means)) < 4 / np.sqrt(64 * 40)
        assert 0.6 / 8 < np.std(means) < 1.4 / 8


def test_labels_reach_the_network_and_some_are_hidden(monkeypatch):
    def apply_fn(params, x, t, dropout_key=None, labels=None):
        return params["w"] * (labels == 7).astype(x.dtype)[:, None, None, None] + 0.0 * x

    monkeypatch.setattr(training, "loss", lambda f, s, x, key, gamma, *, indices: f(x, None).mean())
    config = make_config(label_dropout=0.2)
    step = make_train_step(apply_fn, SCHEDULE, config, num_classes=7)
    batch = {
        "image": np.zeros((500, 1, 1, 1), np.uint8),
        "label": np.arange(500, dtype=np.int32) % 7,
    }
    state = init_state({"w": jnp.float32(1)}, config)
    hidden = []
    for n in range(10):
        w = float(state.params["w"])
        state, metrics = step(state._replace(step=jnp.int32(n)), batch)
        hidden.append(float(metrics["loss"]) / w)
    assert abs(np.mean(hidden) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 5000)


def test_the_step_compiles_once_and_consumes_its_state():
    config = make_config()
    step = make_train_step(affine, SCHEDULE, config)
    params = affine_params()
    state = init_state(params, config)
    for n in range(4):
        old, (state, _) = state, step(state, make_batch(8, seed=n))
        assert old.params["w"].is_deleted()
        assert old.ema["w"].is_deleted()
    assert step._cache_size() == 1
    assert not params["w"].is_deleted()  # the caller's parameters are copied


def test_sharded_over_eight_devices_it_is_the_same_step():
    config = make_config()
    step = make_train_step(affine, SCHEDULE, config)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def run(state_sharding, batch_sharding):
        state = jax.device_put(init_state(affine_params(), config), state_sharding)
        losses = []
        for n in range(5):
            batch = jax.device_put(make_batch(16, seed=n), batch_sharding)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return losses

    one = run(jax.devices()[0], jax.devices()[0])
    eight = run(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_the_step_exports_to_tpu_and_cuda_without_its_weights():
    def apply_fn(params, x, t, dropout_key=None):
        hidden = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x + hidden.mean(-1, keepdims=True) * params["scale"].mean()

    config = make_config(flip=True)
    params = {"kernel": jnp.zeros((3, 3, 1, 64)), "scale": jnp.zeros(100_000)}
    state = jax.eval_shape(lambda p: init_state(p, config), params)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(8)))
    step = make_train_step(apply_fn, SCHEDULE, config)
    exported = jax.export.export(step, platforms=("tpu", "cuda"))(state, batch)
    assert exported.platforms == ("tpu", "cuda")
    assert len(exported.mlir_module_serialized) < 100_000  # the weights alone are 400 kB


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("num_updates", -3, "num_updates must be at least 1"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("learning_rate", float("nan"), "learning_rate must be positive"),
        ("grad_clip", float("inf"), "grad_clip must be positive and finite"),
        ("warmup_steps", -1, "warmup_steps must be at least 0"),
        ("adam_b1", 1.0, r"adam_b1 must be in \[0, 1\)"),
        ("ema_decay", 1.0, r"ema_decay must be in \[0, 1\)"),
        ("label_dropout", 1.5, r"label_dropout must be in \[0, 1\]"),
        ("seed", -1, "seed must be in 0"),
        ("keep", 0, "keep must be at least 1"),
        ("accumulate", 3, "accumulate must be a divisor of batch_size = 8, got 3"),
        ("fsdp", 0, "fsdp must be at least 1"),
        ("sample_every", -1, "sample_every must be at least 0"),
        ("prediction", "w", "prediction must be one of 'eps', 'x_0', 'v', 'edm', got 'w'"),
        ("gamma", "two", "unknown gamma 'two'"),
        ("sigma_data", 0.0, "sigma_data must be positive"),
    ],
)
def test_a_config_rejects(field, value, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{field: value})
