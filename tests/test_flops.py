"""Operations counted from shapes, against counts by hand and XLA's own on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.networks.flops import count_flops, flops_per_image
from ddim_jax.networks.unet import UNetConfig, abstract_params, make_apply
from tests.tiny import UNET

A, B = jnp.ones((5, 7)), jnp.ones((7, 3))
SQUARE = jnp.eye(3)
ONCE = 2 * 5 * 7 * 3


def repeated(times):
    return lambda a, b: jax.lax.scan(
        lambda c, _: (c + a @ b, None), jnp.zeros((5, 3)), length=times
    )


def custom(kind):
    function = kind(lambda a, b: a @ b)
    if kind is jax.custom_vjp:
        function.defvjp(lambda a, b: (a @ b @ SQUARE, None), lambda _, g: (g, g))
    else:
        function.defjvps(None, None)
    return function


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda a, b: a @ b, ONCE),
        (
            lambda a, b: jnp.einsum("nij,njk->nik", jnp.ones((4, 5, 7)), jnp.ones((4, 7, 3))),
            4 * ONCE,
        ),
        (lambda a, b: jnp.tanh(a) + 1, 0),
        (jax.jit(lambda a, b: a @ b), ONCE),
        (jax.checkpoint(lambda a, b: a @ b), ONCE),
        (jax.vmap(lambda a, b: a @ b, (0, None)), ONCE),
        (custom(jax.custom_jvp), ONCE),
        (custom(jax.custom_vjp), ONCE),
        (repeated(10), 10 * ONCE),
        (jax.checkpoint(repeated(3)), 3 * ONCE),
        (lambda a, b: jax.lax.fori_loop(0, 10, lambda i, c: c + a @ b, a @ b), 11 * ONCE),
        (
            lambda a, b: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + a @ b, A @ B),
            2 * ONCE,
        ),
        (lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: a @ b @ SQUARE), ONCE + 90),
    ],
)
def test_matrix_products(function, flops):
    assert count_flops(function, A, B) == flops


CONVOLUTIONS = {  # stride, padding, dilation of input and kernel, groups
    "valid": (1, "VALID", 1, 1, 1),
    "same": (1, "SAME", 1, 1, 1),
    "strided": (2, ((0, 1), (0, 1)), 1, 1, 1),
    "transposed": (1, ((2, 2), (1, 2)), 2, 1, 1),
    "dilated": (1, ((2, 0), (3, 3)), 1, 2, 1),
    "grouped": (1, "SAME", 1, 1, 2),
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_are_their_products_with_the_image(options):
    """Of ones, a convolution without bias sums to its number of products."""
    stride, padding, spread, dilation, groups = options
    x, kernel = jnp.ones((2, 7, 9, 4)), jnp.ones((3, 2, 4 // groups, 6))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, padding, (spread,) * 2, (dilation,) * 2,
            ("NHWC", "HWIO", "NHWC"), groups,
        )  # fmt: skip

    assert count_flops(convolve, x, kernel) == 2 * int(convolve(x, kernel).sum())


def test_a_convolution_by_hand():
    x, kernel = jnp.ones((1, 1, 8, 8)), jnp.ones((16, 1, 3, 3))  # channels first
    flops = count_flops(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), x, kernel)
    assert flops == 2 * 6 * 6 * 16 * 9


@pytest.mark.parametrize("change", [{}, {"remat": True}, {"num_classes": 3, "dtype": "bfloat16"}])
def test_the_network_is_counted_as_xla_counts_it(change):
    config = dataclasses.replace(UNET, **change)
    shape, params = (4, 8, 8, 3), abstract_params(config)
    got = flops_per_image(make_apply(config), params, shape, config.num_classes)
    x, t = jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct((4,), "int32")
    labels = {} if config.num_classes is None else {"labels": t}
    lowered = jax.jit(make_apply(config)).lower(params, x, t, **labels)
    np.testing.assert_allclose(got, lowered.cost_analysis()["flops"] / 4, rtol=0.05)


def test_the_cifar10_network_takes_11_6_billion():
    """5.81 billion products: XLA says 11.66 with its norms and nonlinearities."""
    config = UNetConfig()
    flops = flops_per_image(make_apply(config), abstract_params(config), (2, 32, 32, 3))
    assert flops == pytest.approx(11.62e9, rel=1e-3)


def test_counting_compiles_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("lowered or compiled")

    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", refuse)
    monkeypatch.setattr("jax._src.interpreters.mlir.lower_jaxpr_to_module", refuse)
    config = dataclasses.replace(UNET, channels=64)
    per_image = [
        flops_per_image(make_apply(config), abstract_params(config), (n, 8, 8, 3)) for n in (1, 4)
    ]
    assert per_image[0] == per_image[1] > 1e7
