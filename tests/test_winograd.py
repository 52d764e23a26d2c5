"""Winograd's convolution against float64 NumPy, its derivatives, and where it is taken."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.networks.flops import count_flops
from ddim_jax.networks.winograd import conv3, winograd
from tests.test_conv import (
    DOWN,
    SAME,
    close,
    normal,
    np_conv,
    np_input_gradient,
    np_kernel_gradient,
    ours,
    plain,
)

SHAPE = 14, 12, 13, 64  # large enough for this limit, of odd width


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr("ddim_jax.networks.winograd.PRODUCTS", 9 * 13 * 12 * 12 * 64 * 64)


@pytest.mark.parametrize(
    ("batch", "height", "width", "c_in", "c_out", "padding"),
    [
        (2, 8, 8, 16, 8, SAME),
        (3, 7, 9, 8, 16, SAME),
        (2, 6, 5, 8, 8, DOWN),
        (2, 5, 6, 8, 8, ((0, 2), (2, 1))),
        (3, 3, 1, 64, 32, SAME),
        (6, 32, 32, 4, 4, SAME),  # two images at a time
        (3, 32, 32, 4, 4, SAME),  # one
    ],
)
def test_values_are_float64s(batch, height, width, c_in, c_out, padding):
    """Bᵀ, G and Aᵀ add at most 2, 1.5 and 3 in each axis, so a rounding of 6e-8 grows to
    (2 · 1.5 · 3)² · 6e-8 = 5e-6 at worst."""
    x, kernel = normal(batch, height, width, c_in), normal(3, 3, c_in, c_out, seed=1)
    close(winograd(x, kernel, padding), np_conv(x, kernel, 1, padding))


@pytest.fixture(scope="module")
def case():
    return normal(*SHAPE), normal(3, 3, 64, 64, seed=1), normal(*SHAPE, seed=2)


@pytest.mark.parametrize("padding", [pytest.param(SAME, marks=pytest.mark.slow), ((0, 1), (2, 1))])
def test_gradients_are_float64s(case, padding):
    x, kernel, _ = case
    y, pull = jax.vjp(jax.jit(lambda x, kernel: ours(x, kernel, 1, padding)), x, kernel)
    close(y, np_conv(x, kernel, 1, padding))
    x_bar, kernel_bar = jax.jit(pull)(g := normal(*y.shape, seed=3))
    close(x_bar, np_input_gradient(kernel, g, x.shape, 1, padding))
    close(kernel_bar, np_kernel_gradient(x, g, 1, padding))


def test_other_derivatives(case):
    x, kernel, x_dot = case
    kernel_dot = normal(*kernel.shape, seed=4)
    _, y_dot = jax.jvp(jax.jit(ours), (x, kernel), (x_dot, kernel_dot))
    close(y_dot, np_conv(x_dot, kernel) + np_conv(x, kernel_dot))

    def gradient(x, kernel):  # of half a square
        return jax.grad(lambda x, kernel: (ours(x, kernel) ** 2).sum() / 2)(x, kernel)

    twice = jax.jit(jax.grad(lambda kernel: (gradient(x, kernel) * x_dot).sum()))(kernel)
    y, y_dot = np_conv(x, kernel), np_conv(x_dot, kernel)  # d/dkernel ⟨y, y_dot⟩
    close(twice, np_kernel_gradient(x, y_dot) + np_kernel_gradient(x_dot, y))


@pytest.mark.parametrize("axes", [(1, None), (0, 1), (None, 0)])
def test_vmap(axes):
    x, kernel = normal(14, 12, 12, 64), normal(3, 3, 64, 64, seed=1)
    stacked = [
        v if axis is None else np.stack([v, -2 * v], axis) for v, axis in zip((x, kernel), axes)
    ]
    got = jax.jit(jax.vmap(ours, axes))(*stacked)
    factor = -2.0 if None in axes else 4.0
    want = np_conv(x, kernel)
    close(got, np.stack([want, factor * want]))


def test_where_it_is_taken(case):
    x, kernel, _ = (jnp.asarray(v) for v in case)

    def taken(x, kernel, *args):
        return "conv3[" in str(jax.make_jaxpr(lambda x, kernel: ours(x, kernel, *args))(x, kernel))

    assert taken(x, kernel)
    assert taken(x, kernel, 1, "SAME")
    assert not taken(x, kernel, 2)
    assert not taken(x, kernel, 1, ((3, 3), (3, 3)))
    assert not taken(x[:1], kernel)
    assert not taken(x[..., :8], kernel[:, :, :8])
    assert not taken(x[:, :8, :8], kernel)
    assert not taken(x, kernel[:1])
    assert not taken(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    (size,) = jax.export.symbolic_shape("b")
    batch = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    assert not taken(batch, kernel)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("batch")))
    assert not taken(spread, kernel)


def test_its_operations_are_those_of_the_convolution(case):
    assert count_flops(ours, *case[:2]) == count_flops(plain, *case[:2])
    both = (lambda f: jax.grad(lambda x, kernel: (f(x, kernel) ** 2).sum()))(ours)
    assert count_flops(both, *case[:2]) == 2 * count_flops(plain, *case[:2])


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_other_platforms_get_the_convolution_to_the_letter(case, platform):
    def text(layer):
        def f(x, kernel):
            return jax.grad(lambda x: (layer(x, kernel) ** 2).sum())(x)

        module = jax.export.export(jax.jit(f), platforms=[platform])(*case[:2]).mlir_module()
        return re.sub(r"loc\(.*\)|#loc.*|\s", "", module)

    assert text(ours) == text(plain)


def test_a_sampler_transforms_the_kernel_once(case):
    x, kernel, _ = case
    model = ddim.Model(lambda w, x, t: ours(x, w) / 50, kernel, ddim.linear_schedule(1000))
    tau = ddim.timesteps(1000, 3)
    jitted = jax.jit(lambda kernel, x: ddim.make_sampler(model, tau)(x, params=kernel))
    compiled = jitted.lower(kernel, x).compile().as_text()
    blocks = re.findall(r"^(?:ENTRY )?%\S+ \(.*?^}", compiled, re.M | re.S)
    entry, *_ = (b for b in blocks if b.startswith("ENTRY"))
    body = re.search(r"body=(%\S+?),", entry)[1]
    loop, *_ = (b for b in blocks if b.startswith(f"{body} "))
    assert "f32[16,9]" in entry  # G of both axes
    assert "f32[16,9]" not in loop
    assert "f32[16,64,64]" in loop or "f32[16,4096]" in loop  # what it made of the kernel


def test_the_primitive_alone(case):
    x, kernel, _ = case
    options = (("dimension_numbers", ("NHWC", "HWIO", "NHWC")),)
    got = conv3.bind(x, kernel, padding=SAME, options=options, back=False)
    close(got, np_conv(x, kernel))
