import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ddim_jax as ddim
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)
ROOT = jnp.asarray(np.sqrt(1 - A), jnp.float32)


def exact(x, t):
    """The optimal ε for data N(0, 1): √(1 − ᾱ_t) x_t."""
    return ROOT[t].reshape(-1, *(1,) * (x.ndim - 1)) * x


def exact_gaussian(mean, variance):
    """The optimal ε for data N(mean, variance), for JAX and for NumPy."""

    def numpy(x, t):
        a = A[t]
        return np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (a * variance + 1 - a)

    gain = jnp.asarray(np.sqrt(1 - A) / (A * variance + 1 - A), jnp.float32)
    shift = jnp.asarray(np.sqrt(A) * mean, jnp.float32)

    def jax_(x, t):
        return gain[t][:, None] * (x - shift[t][:, None])

    return jax_, numpy


# The network of the golden sums: ε(x, i) = x·i/(i + 1), i = t − 1.
def toy(x, t):
    i = (t - 1).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return x * i / (i + 1)


def golden_input():
    x = np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4) / 768
    return jnp.asarray(x.transpose(3, 0, 1, 2))


UNIFORM = ddim.timesteps(1000, 10, "uniform")


@pytest.mark.parametrize(
    ("schedule", "tau", "prediction", "total"),
    [
        (SCHEDULE, UNIFORM, "eps", 172.0067),
        (ddim.linear_schedule(1000, beta_start=0.01), UNIFORM, "eps", 149.8295),
        (SCHEDULE, UNIFORM, "v", 52.5302),
        (SCHEDULE, ddim.timesteps(1000, 10, "quad"), "eps", 178.6596),
    ],
)
def test_golden_sums(schedule, tau, prediction, total):
    x_0 = ddim.sample(ddim.predicts(toy, prediction), golden_input(), schedule, tau)
    assert abs(float(jnp.abs(x_0).sum()) / total - 1) < 1e-3
    if total == 172.0067:
        assert abs(float(jnp.abs(x_0).mean()) - 0.223967) < 2e-4


@pytest.mark.parametrize(
    ("steps", "tolerance"), [(10, 1e-5), (50, 1e-5), (100, 1e-5), (1000, 5e-5)]
)
@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_float32_against_float64_numpy(steps, tolerance, spacing):
    denoise, numpy_eps = exact_gaussian(mean=0.4, variance=0.09)
    x_T = np.asarray(ddim.initial_noise(jax.random.key(1), 16, (32,)))
    tau = ddim.timesteps(1000, steps, spacing)
    want = reference.ddim_loop(numpy_eps, x_T, A, tau)
    for got in (
        ddim.sample(denoise, x_T, SCHEDULE, tau),
        jax.jit(lambda x: ddim.sample(denoise, x, SCHEDULE, tau))(x_T),
    ):
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < tolerance, error


def test_one_step_is_as_good_as_float32_eps():
    """S = 1 divides ε's own float32 rounding by √ᾱ_T = 0.006: nothing after it can do better."""
    denoise, numpy_eps = exact_gaussian(mean=0.4, variance=0.09)
    x_T = np.asarray(ddim.initial_noise(jax.random.key(1), 16, (32,)))
    want = reference.ddim_loop(numpy_eps, x_T, A, [1000])
    got = ddim.sample(denoise, x_T, SCHEDULE, [1000])
    bound = 4 * np.finfo(np.float32).eps * np.abs(x_T).max() / np.sqrt(A[1000])
    assert np.abs(got - want).max() < bound


@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize("steps", [10, 100])
def test_noisy_float32_against_float64_numpy(eta, steps):
    """The same noise, drawn per (key, image, t) as documented, in a float64 loop."""
    denoise, numpy_eps = exact_gaussian(mean=0.4, variance=0.09)
    key = jax.random.key(3)
    x_T = np.asarray(ddim.initial_noise(jax.random.key(1), 4, (8,)))

    def noise(t):
        fold = jax.random.fold_in
        return np.stack([jax.random.normal(fold(fold(key, i), t), (8,)) for i in range(4)])

    tau = ddim.timesteps(1000, steps)
    want = reference.ddim_loop(numpy_eps, x_T, A, tau, eta, noise)
    got = ddim.sample(denoise, x_T, SCHEDULE, tau, eta, key)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_traced_tau_and_eta_agree_with_the_host():
    x_T = ddim.initial_noise(jax.random.key(1), 4, (8,))
    key = jax.random.key(3)
    traced = jax.jit(lambda tau, eta: ddim.sample(exact, x_T, SCHEDULE, tau, eta, key))
    tau = ddim.timesteps(1000, 50)
    for eta in (0.0, 0.5, 1.0):
        want = ddim.sample(exact, x_T, SCHEDULE, tau, eta, key)
        np.testing.assert_allclose(traced(tau, eta), want, rtol=1e-3, atol=1e-4)


def test_one_compilation_for_ten_calls():
    """η, weights, τ's values and seeds are traced: only a new S recompiles."""
    traces = []

    def apply_fn(params, x, t):
        traces.append(x.shape)
        return params["w"] * exact(x, t)

    weights = {"w": jnp.float32(1)}
    sampler = ddim.make_sampler(ddim.Model(apply_fn, weights, SCHEDULE), ddim.timesteps(1000, 20))
    outputs = set()
    for i in range(10):
        key = jax.random.key(i)
        tau = ddim.timesteps(1000, 20, "quadratic" if i % 2 else "linear")
        x_T = ddim.initial_noise(key, 4, (8,))
        weights = {"w": jnp.float32(1 - i / 100)}
        out = sampler(x_T, key, params=weights, eta=i / 10, tau=tau)
        outputs.add(float(out.sum()))
    assert len(traces) == 1
    assert len(outputs) == 10
    sampler(x_T, key, method=ddim.ddpm("large"))
    assert len(traces) == 1
    sampler(x_T, key, tau=ddim.timesteps(1000, 21))
    assert len(traces) == 2


def test_make_sampler_is_sample():
    x_T = ddim.initial_noise(jax.random.key(1), 4, (8,))
    tau = ddim.timesteps(1000, 20)
    apply_fn = ddim.predicts(lambda w, x, t: w * exact(x, t), x0_fn=ddim.clip_x0(1.0))
    model = ddim.Model(apply_fn, 0.9, SCHEDULE)
    for key, options in [
        (None, {}),
        (jax.random.key(0), {"eta": 0.5}),
        (jax.random.key(0), {"method": ddim.ddpm("large")}),
    ]:
        sampler = ddim.make_sampler(model, tau, **options)
        want = ddim.sample(model.denoise, x_T, SCHEDULE, tau, key=key, **options)
        np.testing.assert_allclose(sampler(x_T, key), want, rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(want).max()) <= 1


def test_memory_does_not_grow_with_s():
    def temporary_bytes(steps):
        tau = ddim.timesteps(1000, steps)
        run = jax.jit(lambda x: ddim.sample(exact, x, SCHEDULE, tau, 0.5, jax.random.key(0)))
        memory = run.lower(jnp.zeros((64, 32, 32, 3))).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    small, large = temporary_bytes(10), temporary_bytes(1000)
    assert large - small < 100_000, (small, large)  # tables of scalars; one image batch is 786 kB


def test_network_is_traced_once():
    calls = []

    def network(x, t):
        calls.append(1)
        return exact(x, t)

    jax.jit(lambda x: ddim.sample(network, x, SCHEDULE, ddim.timesteps(1000, 1000)))(
        jnp.ones((2, 2))
    )
    assert len(calls) == 1


def gaussian_variance_recursion(tau, eta, hat=False):
    """Var x_0 when data are N(0, 1), ε is exact and x_T ~ N(0, 1): x_s = g x_t + σ z."""
    variance, tau = 1.0, [0, *[int(t) for t in tau]]
    for i in range(len(tau) - 1, 0, -1):
        t, s = tau[i], tau[i - 1]
        sigma = reference.eta_sigma(A, t, s, eta)
        g = np.sqrt(A[s]) * np.sqrt(A[t]) + np.sqrt(1 - A[s] - sigma**2) * np.sqrt(1 - A[t])
        noise = np.sqrt(1 - A[t] / A[s]) * (s > 0) if hat else sigma
        variance = g**2 * variance + noise**2
    return variance


def test_the_variance_trap():
    """Trap 1: S = 100, η = 1 → 0.92; without σz it is 0.00, without shrinking √(…) it is 9.8."""
    recursion = gaussian_variance_recursion(ddim.timesteps(1000, 100), 1.0)
    assert abs(recursion - 0.92) < 0.01
    n = 40_000
    x_T = ddim.initial_noise(jax.random.key(0), n, (1,))
    x_0 = ddim.sample(exact, x_T, SCHEDULE, ddim.timesteps(1000, 100), 1.0, jax.random.key(1))
    assert abs(float(x_0.var()) - recursion) < 3 * recursion * np.sqrt(2 / n)
    assert abs(float(x_0.mean())) < 3 * np.sqrt(recursion / n)


@pytest.mark.parametrize("spacing", ["linear", "quadratic", "logsnr"])
@pytest.mark.parametrize("steps", [5, 20, 100])
def test_variance_of_every_eta_and_tau(spacing, steps):
    """x_0 is linear in x_T and in each z: drawn from unit vectors, it shows the weight of each."""
    tau = ddim.timesteps(1000, steps, spacing, schedule=SCHEDULE)
    unit = np.eye(steps + 1, dtype=np.float32)
    run = jax.jit(
        lambda plan: ddim.sample(
            exact, unit[0], SCHEDULE, plan.t[::-1], method=lambda *_: plan, noise=unit[1:]
        )
    )
    for eta, hat in ((0.0, False), (0.2, False), (0.5, False), (1.0, False), (1.0, True)):
        method = ddim.ddpm("large") if hat else ddim.ddim(eta)
        plan = method(SCHEDULE, tau)
        if plan.steps.sigma is None:  # the program of every η
            plan = dataclasses.replace(plan, steps=plan.steps._replace(sigma=np.zeros(steps)))
        want = gaussian_variance_recursion(tau, eta, hat)
        np.testing.assert_allclose(np.sum(np.square(run(plan))), want, rtol=1e-3)


def test_sigma_hat_final_noise():
    tau = [300, 1000]  # a large last step, so that its noise shows
    last, unit = 1 - A[300], np.eye(3, dtype=np.float32)
    for final in (False, True):
        method = ddim.ddpm("large", final_noise=final)
        x_0 = ddim.sample(exact, unit[0], SCHEDULE, tau, method=method, noise=unit[1:])
        want = gaussian_variance_recursion(tau, 1.0, hat=True) + final * last
        np.testing.assert_allclose(np.sum(np.square(x_0)), want, rtol=1e-4)


def test_sigma_given_step_by_step():
    tau = ddim.timesteps(1000, 20)
    previous = np.append(0, tau[:-1])
    sigma = ddim.ddim_sigma(SCHEDULE, tau, previous, 0.7)
    x_T, key = ddim.initial_noise(jax.random.key(0), 4, (8,)), jax.random.key(1)
    by_eta = ddim.sample(exact, x_T, SCHEDULE, tau, 0.7, key)
    by_sigma = ddim.sample(exact, x_T, SCHEDULE, tau, key=key, method=ddim.ddim(sigma=sigma))
    by_etas = ddim.sample(exact, x_T, SCHEDULE, tau, np.full(20, 0.7), key)
    np.testing.assert_array_equal(by_eta, by_sigma)
    np.testing.assert_array_equal(by_eta, by_etas)


def test_old_style_keys_draw_the_same():
    x_T = ddim.initial_noise(jax.random.PRNGKey(3), 4, (8,))
    np.testing.assert_array_equal(x_T, ddim.initial_noise(jax.random.key(3), 4, (8,)))
    run = partial(ddim.sample, exact, x_T, SCHEDULE, TAU, 1.0)
    np.testing.assert_array_equal(run(jax.random.PRNGKey(5)), run(jax.random.key(5)))


def test_trajectory_takes_every_kind_of_noise():
    x_T, key = ddim.initial_noise(jax.random.key(0), 3, (4,)), jax.random.key(1)
    for method in (ddim.ddpm("large"), ddim.ddim(sigma=[0.0, 0.05])):
        path = ddim.trajectory(exact, x_T, SCHEDULE, [100, 1000], key=key, method=method)
        want = ddim.sample(exact, x_T, SCHEDULE, [100, 1000], key=key, method=method)
        np.testing.assert_array_equal(path.sample, want)


def test_eta_zero_ignores_the_key():
    x_T = ddim.initial_noise(jax.random.key(0), 4, (8,))
    tau = ddim.timesteps(1000, 20)
    runs = [ddim.sample(exact, x_T, SCHEDULE, tau, 0.0, k) for k in (None, jax.random.key(1))]
    np.testing.assert_array_equal(*runs)
    sampler = ddim.make_sampler(ddim.Model(lambda _, x, t: exact(x, t), 0, SCHEDULE), tau)
    by_key = [sampler(x_T, jax.random.key(i)) for i in (1, 2)]
    np.testing.assert_array_equal(*by_key)


@jax.jit
def stochastic(x_T, key, tau):
    return ddim.sample(exact, x_T, SCHEDULE, tau, 0.8, key)


@given(st.sampled_from([1, 12]), st.sampled_from([1, 6]), st.data())
def test_batch_split_invariance(steps, cut, data):
    """Image k does not depend on the batch it was drawn in, η > 0 included."""
    tau = sorted(data.draw(st.sets(st.integers(1, 1000), min_size=steps, max_size=steps)))
    key = jax.random.key(data.draw(st.integers(0, 99)))
    x_T = ddim.initial_noise(key, 7, (3, 2))
    run = partial(stochastic, tau=np.array(tau))
    whole = run(x_T, ddim.image_keys(key, 7))
    parts = [
        run(x_T[k], ddim.image_keys(key, np.arange(7)[k])) for k in (slice(cut), slice(cut, 7))
    ]
    # Another batch may round otherwise, by a few 6e-8 of x, which x̂_0 divides by √ᾱ.
    atol = 1e-6 / np.sqrt(A[tau[-1]])
    np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("indices", [[5], list(range(7)), list(range(64))])
def test_initial_noise_is_per_image(indices):
    key = jax.random.key(7)
    alone = jax.random.normal(jax.random.fold_in(key, 5), (4, 3))
    drawn = ddim.initial_noise(key, indices, (4, 3))
    np.testing.assert_array_equal(drawn[indices.index(5)], alone)


def test_device_count_invariance():
    """One device or eight: the same noise bit for bit, the same images, and no collective."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    shard = NamedSharding(mesh, PartitionSpec("data"))
    key, tau = jax.random.key(0), ddim.timesteps(1000, 10)
    make = lambda indices: ddim.initial_noise(key, indices, (4, 4, 1))  # noqa: E731
    spread = jax.jit(make, out_shardings=shard)(jnp.arange(16))
    one = make(np.arange(16))
    np.testing.assert_array_equal(spread, one)
    run = jax.jit(lambda x: ddim.sample(exact, x, SCHEDULE, tau, 0.5, key))
    np.testing.assert_allclose(run(spread), run(one), rtol=1e-5, atol=1e-6)
    hlo = run.lower(spread).compile().as_text()
    assert not any(op in hlo for op in ("all-reduce", "all-gather", "all-to-all", "collective"))


def test_trajectory_keeps_what_it_is_asked():
    x_T = ddim.initial_noise(jax.random.key(0), 3, (4,))
    tau, key = ddim.timesteps(1000, 10), jax.random.key(1)
    full = ddim.trajectory(exact, x_T, SCHEDULE, tau, 0.5, key)
    assert full.t.tolist() == tau[::-1].tolist()
    np.testing.assert_array_equal(full.x_t[0], x_T)
    np.testing.assert_array_equal(full.sample, ddim.sample(exact, x_T, SCHEDULE, tau, 0.5, key))
    a = A[full.t][:, None, None]
    x_t = np.asarray(full.x_t, np.float64)
    predicted = (x_t - np.sqrt(1 - a) * np.sqrt(1 - a) * x_t) / np.sqrt(a)
    np.testing.assert_allclose(full.x_0, predicted, rtol=1e-3, atol=1e-4)
    some = ddim.trajectory(exact, x_T, SCHEDULE, tau, 0.5, key, at=[100, 700])
    assert some.t.tolist() == [700, 100]
    np.testing.assert_array_equal(some.x_t, full.x_t[jnp.array([3, 9])])
    np.testing.assert_array_equal(some.x_0, full.x_0[jnp.array([3, 9])])


def test_watch_sees_every_step_under_jit():
    seen = []
    watched = ddim.watch(ddim.predicts(exact, "v"), lambda t: seen.append(int(t)))
    assert watched.prediction.kind == "v"
    jax.block_until_ready(
        jax.jit(lambda x: ddim.sample(watched, x, SCHEDULE, [1, 10, 100]))(jnp.ones((2, 2)))
    )
    jax.effects_barrier()
    assert sorted(seen) == [1, 10, 100]
    model = ddim.watch(ddim.Model(lambda w, x, t: w * x, 1.0, SCHEDULE), lambda t: seen.append(-t))
    ddim.make_sampler(model, [500])(jnp.ones((2, 2))).block_until_ready()
    jax.effects_barrier()
    assert seen[-1] == -500


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_follows_x(dtype):
    out = ddim.sample(lambda x, t: x * 0, jnp.ones((2, 2), dtype), SCHEDULE, [1, 10])
    assert out.dtype == dtype


def test_the_state_is_float32_whatever_the_network_computes_in():
    """A thousand steps of bfloat16 sums drift by 0.05; of bfloat16 calls they do not.

    One image's rounding is 2⁻⁹ of 0.7; means over n and 1,000 calls are within its standard errors.
    """
    n = 4000
    denoise = ddim.oracle.gaussian(SCHEDULE, 0.5, 0.04)
    x_T = ddim.initial_noise(jax.random.key(0), n, (1,), jnp.bfloat16)
    x_0 = ddim.sample(denoise, x_T, SCHEDULE, np.arange(1, 1001))
    assert x_0.dtype == jnp.bfloat16
    x_0 = np.asarray(x_0, np.float64)
    assert abs(x_0.mean() - 0.5) < 4 * 0.2 / np.sqrt(n) + 2**-9
    assert abs(x_0.std() - 0.2) < 4 * 0.2 / np.sqrt(2 * n) + 2**-9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_is_one_draw_rounded_to_every_dtype(dtype):
    draw = lambda dtype: ddim.initial_noise(jax.random.key(0), 3, (4,), dtype)  # noqa: E731
    np.testing.assert_array_equal(draw(dtype), draw(jnp.float32).astype(dtype))
    noise = lambda dtype: ddim.sample(  # noqa: E731, x̂_0 = 0 and no direction: σ̂ z alone is left
        lambda x, t: jnp.zeros_like(x), jnp.zeros((3, 4), dtype), SCHEDULE, [999], key=KEY,
        method=ddim.ddpm("large", final_noise=True),
    )  # fmt: skip
    np.testing.assert_array_equal(noise(dtype), noise(jnp.float32).astype(dtype))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_gradient_in_eta_is_the_slope(eta):
    """The last step's σ and direction are √0 for every η: their slope is 0, not NaN."""
    x_T, tau = ddim.initial_noise(jax.random.key(0), 4, (3,)), [100, 500, 1000]
    schedule = ddim.linear_schedule(1000)  # JAX keeps a constant that it has seen in float32
    denoise = ddim.oracle.gaussian(schedule, 0.0, 0.3)

    def total(eta):
        return ddim.sample(denoise, x_T, schedule, tau, eta, KEY).sum()

    with jax.enable_x64(True):
        h, x_T = 1e-6, x_T.astype(jnp.float64)
        slope = (float(total(eta + h)) - float(total(eta))) / h
        got = jax.jit(jax.grad(total))(jnp.float64(eta))
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


def test_gradients_at_the_ends_of_the_schedule():
    """In σ, and in the schedule itself, whose log ᾱ_0 = 0 stands under a root."""
    x_T = ddim.initial_noise(jax.random.key(0), 2, (3,))
    by_sigma = jax.grad(
        lambda sigma: ddim.sample(
            exact, x_T, SCHEDULE, TAU, key=KEY, method=ddim.ddim(sigma=sigma)
        ).sum()
    )(jnp.zeros(2))
    assert np.isfinite(by_sigma).all()
    by_schedule = jax.grad(
        lambda log: ddim.sample(lambda x, t: 0.9 * x, x_T, ddim.Schedule(log), TAU).sum()
    )(jnp.asarray(SCHEDULE.log_alpha_bar, jnp.float32))
    assert np.isfinite(by_schedule).all()
    assert (np.asarray(by_schedule)[TAU] != 0).all()


def test_export_for_tpu_and_cuda():
    @jax.jit
    def run(weight, x_T, eta):
        return ddim.sample(
            lambda x, t: weight * x, x_T, SCHEDULE, ddim.timesteps(1000, 50), eta, jax.random.key(0)
        )

    x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    exported = jax.export.export(run, platforms=["tpu", "cuda"])(scalar, x, scalar)
    assert set(exported.platforms) == {"tpu", "cuda"}
    assert "while" in exported.mlir_module()


def test_zero_terminal_snr_with_v():
    """Data at a point c: v is exact, ᾱ_T = 0 is no obstacle."""
    schedule = ddim.rescale_zero_terminal_snr(SCHEDULE)
    log = jnp.asarray(schedule.log_alpha_bar)

    def v_of_a_point(x, t):
        a = jnp.exp(log[t] / 2)[:, None]
        b = jnp.sqrt(-jnp.expm1(log[t]))[:, None]
        return a * (x - a * 0.3) / b - b * 0.3

    x_T = ddim.initial_noise(jax.random.key(0), 4, (3,))
    for eta in (0.0, 1.0):
        x_0 = ddim.sample(
            ddim.predicts(v_of_a_point, "v"),
            x_T,
            schedule,
            ddim.timesteps(1000, 20),
            eta,
            jax.random.key(1),
        )
        np.testing.assert_allclose(x_0, 0.3, rtol=1e-4)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        ddim.sample(exact, x_T, schedule, ddim.timesteps(1000, 20))


X = jnp.ones((2, 3))
TAU = [1, 10]
KEY = jax.random.key(0)
MODEL = ddim.Model(lambda w, x, t: w * x, 1.0, SCHEDULE)


def run(method, key=None):
    return ddim.sample(exact, X, SCHEDULE, TAU, key=key, method=method)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ddim.sample(exact, X, SCHEDULE, [10, 1]), ValueError, "increase strictly"),
        (lambda: ddim.sample(exact, X, SCHEDULE, [0, 1]), ValueError, "1..1000"),
        (lambda: ddim.sample(exact, X, SCHEDULE, [1, 1001]), ValueError, "1..1000"),
        (lambda: ddim.sample(exact, X, SCHEDULE, TAU, eta=0.5), ValueError, "needs key"),
        (lambda: ddim.sample(exact, X, SCHEDULE, TAU, -0.5, KEY), ValueError, "eta must be >= 0"),
        (lambda: ddim.sample(exact, X, SCHEDULE, TAU, 2.0, KEY), ValueError, "too large"),
        (lambda: ddim.sample(exact, X, SCHEDULE, TAU, [0.1] * 3, KEY), ValueError, "one value per"),
        (lambda: run(ddim.ddim(sigma=[0.1] * 3), KEY), ValueError, "sigma must be a scalar or one"),
        (lambda: ddim.sample(exact, X.astype(jnp.uint8), SCHEDULE, TAU), TypeError, "127.5"),
        (lambda: ddim.sample(exact, jnp.float32(1), SCHEDULE, TAU), ValueError, "scalar"),
        (lambda: ddim.sample(lambda x, t: x[:, :1], X, SCHEDULE, TAU), ValueError, "shape of its"),
        (lambda: ddim.sample(ddim.predicts(exact, "z"), X, SCHEDULE, TAU), ValueError, "'z'"),
        (lambda: run(ddim.ddim(1.0), ddim.image_keys(KEY, 3)), ValueError, "keys of 3 images"),
        (lambda: ddim.ddpm("huge"), ValueError, "'huge'"),
        (lambda: ddim.ddpm(final_noise=True), ValueError, "large"),
        (lambda: ddim.ddim(0.5, sigma=[0.0, 0.1]), ValueError, "eta or sigma, not both"),
        (lambda: run(ddim.ddim(sigma=0.1), KEY), ValueError, "s = 0"),
        (
            lambda: ddim.sample(exact, X, SCHEDULE, TAU, 0.5, KEY, method=ddim.ddim()),
            ValueError,
            "eta or a method, not both",
        ),
        (lambda: ddim.sample(exact, X, SCHEDULE, TAU, 1.0, 7), TypeError, "one JAX key"),
        (lambda: ddim.initial_noise(None, 2, (2,)), TypeError, "one JAX key"),
        (lambda: ddim.sample(exact, [[1.0]], SCHEDULE, TAU), TypeError, "lists"),
        (lambda: ddim.trajectory(exact, X, SCHEDULE, TAU, at=[2]), ValueError, "tau visits"),
        (lambda: ddim.make_sampler(MODEL, [2, 1]), ValueError, "increase"),
        (lambda: ddim.make_sampler(MODEL, TAU, 0.5)(X), ValueError, "needs key"),
        (lambda: ddim.initial_noise(KEY, [-1], (2,)), ValueError, "0..2"),
        (lambda: ddim.initial_noise(KEY, [2**32], (2,)), ValueError, "another key"),
        (lambda: ddim.initial_noise(KEY, 0, (2,)), ValueError, ">= 1"),
        (lambda: ddim.initial_noise(KEY, [0.5], (2,)), ValueError, "ints"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()
