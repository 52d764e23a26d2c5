"""The convolution against float64 NumPy, whatever is differentiated, and what it is lowered to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from ddim_jax.networks.conv import PIXELS, conv

SAME, DOWN = ((1, 1), (1, 1)), ((0, 1), (0, 1))
NHWC = ("NHWC", "HWIO", "NHWC")


def ours(x, kernel, stride=1, padding=SAME):
    return conv(x, kernel, (stride, stride), padding, dimension_numbers=NHWC)


def plain(x, kernel, stride=1, padding=SAME):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=NHWC
    )


def patches(x, stride, padding):
    """(B, H', W', C, 3, 3)"""
    x = np.pad(np.float64(x), ((0, 0), *padding, (0, 0)))
    return sliding_window_view(x, (3, 3), (1, 2))[:, ::stride, ::stride]


def np_conv(x, kernel, stride=1, padding=SAME):
    return np.einsum("bhwcij,ijcd->bhwd", patches(x, stride, padding), kernel, optimize=True)


def np_kernel_gradient(x, g, stride=1, padding=SAME):
    return np.einsum("bhwcij,bhwd->ijcd", patches(x, stride, padding), g, optimize=True)


def np_input_gradient(kernel, g, shape, stride, padding):
    rows, columns = (low + size + high for (low, high), size in zip(padding, shape[1:3]))
    x = np.zeros((shape[0], rows, columns, shape[3]))
    height, width = g.shape[1:3]
    for i in range(3):
        for j in range(3):
            there = (slice(i, i + stride * height, stride), slice(j, j + stride * width, stride))
            x[:, *there] += np.float64(g) @ kernel[i, j].T
    (top, _), (left, _) = padding
    return x[:, top : top + shape[1], left : left + shape[2]]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, want, rtol=1e-5):
    assert np.shape(got) == np.shape(want)
    assert np.abs(got - want).max() < rtol * np.abs(want).max()


def convolutions(function, *args, platform="cpu"):
    exported = jax.export.export(jax.jit(function), platforms=[platform])(*args)
    return exported.mlir_module().count("stablehlo.convolution")


@pytest.mark.parametrize(
    ("batch", "height", "width", "c_in", "c_out", "stride", "padding"),
    [
        (8, 32, 32, 3, 8, 1, SAME),  # the sizes of the CIFAR-10 network, with fewer channels
        (8, 32, 32, 8, 3, 1, "SAME"),
        (8, 32, 32, 8, 8, 2, DOWN),
        (16, 32, 32, 8, 8, 2, DOWN),
        (32, 16, 16, 8, 16, 1, SAME),
        (32, 16, 16, 16, 8, 2, DOWN),
        (8, 8, 8, 16, 8, 1, SAME),
        (8, 4, 4, 16, 8, 1, SAME),
        (8, 28, 28, 4, 8, 1, SAME),  # strips of 9, 9, 9 and 1 rows
        (64, 7, 9, 8, 4, 1, SAME),
        (20, 26, 22, 4, 4, 2, DOWN),
        (600, 5, 4, 3, 4, 1, SAME),  # never less than two rows
    ],
)
def test_values_and_gradients_are_float64s(batch, height, width, c_in, c_out, stride, padding):
    x, kernel = normal(batch, height, width, c_in), normal(3, 3, c_in, c_out, seed=1)
    y, pull = jax.vjp(lambda x, kernel: ours(x, kernel, stride, padding), x, kernel)
    pads = SAME if padding == "SAME" else padding
    close(y, np_conv(x, kernel, stride, pads))
    g = normal(*y.shape, seed=2)
    x_bar, kernel_bar = jax.jit(pull)(g)
    close(x_bar, np_input_gradient(kernel, g, x.shape, stride, pads))
    close(kernel_bar, np_kernel_gradient(x, g, stride, pads))


def test_forward_mode_second_order_and_vmap():
    x, x_dot, kernel, kernel_dot = (
        normal(*shape, seed=i) for i, shape in enumerate([(4, 32, 32, 4)] * 2 + [(3, 3, 4, 4)] * 2)
    )
    assert convolutions(jax.grad(lambda k: ours(x, k).sum()), kernel) > 1  # it is in strips
    _, y_dot = jax.jvp(jax.jit(ours), (x, kernel), (x_dot, kernel_dot))
    close(y_dot, np_conv(x_dot, kernel) + np_conv(x, kernel_dot))

    def half_square(x, kernel):
        return (ours(x, kernel) ** 2).sum() / 2

    gradient = jax.grad(half_square, argnums=1)
    _, change = jax.jvp(lambda k: jax.jit(gradient)(x, k), (kernel,), (kernel_dot,))
    close(change, np_kernel_gradient(x, np_conv(x, kernel_dot)))
    twice = jax.jit(jax.grad(lambda x: (gradient(x, kernel) * kernel_dot).sum()))(x)
    y, y_dot = np_conv(x, kernel), np_conv(x, kernel_dot)  # d/dx ⟨y, y_dot⟩
    want = np_input_gradient(kernel, y_dot, x.shape, 1, SAME)
    close(twice, want + np_input_gradient(kernel_dot, y, x.shape, 1, SAME))
    both = jax.jit(jax.vmap(gradient, (0, None)))(np.stack([x, x_dot]), kernel)
    close(both, np.stack([np_kernel_gradient(a, np_conv(a, kernel)) for a in (x, x_dot)]))


def test_strips_are_for_kernel_gradients_of_many_pixels_on_a_cpu():
    x, kernel = jnp.ones((8, 32, 32, 4)), jnp.ones((3, 3, 4, 4))

    def gradient(f, argnums):
        return jax.grad(lambda x, kernel: (f(x, kernel) ** 2).sum(), argnums)

    strips = x.shape[0] * 32 * 32 // PIXELS
    assert strips > 1
    assert convolutions(gradient(ours, (0, 1)), x, kernel) == 2 + strips
    assert convolutions(gradient(ours, 1), x, kernel) == 1 + strips
    assert convolutions(gradient(ours, 0), x, kernel) == 2
    assert convolutions(ours, x, kernel) == 1
    for platform in ("tpu", "cuda", "rocm"):
        assert convolutions(gradient(ours, (0, 1)), x, kernel, platform=platform) == 3
    small, half = (x[:2], kernel), (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for args in (small, half):
        assert str(jax.make_jaxpr(ours)(*args)) == str(jax.make_jaxpr(plain)(*args))


def test_the_compiled_gradient_has_no_branches():
    x, kernel = jnp.ones((8, 32, 32, 4)), jnp.ones((3, 3, 4, 4))
    gradient = jax.jit(jax.grad(lambda kernel: (ours(x, kernel) ** 2).sum()))
    assert "conditional" not in gradient.lower(kernel).compile().as_text()


def test_the_gradient_of_a_checkpointed_and_a_scanned_layer():
    x, kernel = normal(4, 32, 32, 2), normal(3, 3, 2, 2, seed=1)

    def run(layer):
        def loss(kernel):
            y, _ = jax.lax.scan(lambda h, _: (jnp.tanh(layer(h, kernel)), None), x, None, 2)
            return (y**2).mean()

        return jax.jit(jax.grad(loss))(kernel)

    want = run(plain)
    close(run(ours), want)
    close(run(jax.checkpoint(ours)), want)
