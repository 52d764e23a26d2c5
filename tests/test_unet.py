"""The U-Net against a float64 NumPy network written from Ho et al.'s description."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.networks.blocks import GroupNorm, upsample
from ddim_jax.networks.blocks import timestep_embedding as embed
from ddim_jax.networks.flops import _jaxprs
from ddim_jax.networks.unet import (
    UNetConfig,
    abstract_params,
    build,
    computed,
    count_params,
    make_apply,
)
from tests.tiny import UNET, assert_same

TINY = dataclasses.replace(UNET, dropout=0.3)


def perturbed(params, seed=0):
    """No leaf is zero or one, so that a leaf left out or put in the wrong place shows."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        fan_in = np.prod(x.shape[:-1])
        centre, width = {
            "kernel": (0.0, fan_in**-0.5),
            "scale": (1.0, 0.3),
            "bias": (0.0, 0.3),
            "label_embedding": (0.0, 1.0),
        }[path[-1].key]
        return jnp.asarray(centre + width * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, params)


def images(batch=2, height=8, width=8, channels=3, seed=1):
    shape = (batch, height, width, channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
    apply_fn, params = build(TINY, jax.random.key(0))
    return jax.jit(apply_fn), perturbed(params)


# ---- the reference: float64, one image at a time, plain loops ----


def swish(x):
    return x / (1 + np.exp(-x))


def np_embedding(index, dim):
    half = dim // 2
    freq = [10000.0 ** (-k / (half - 1)) for k in range(half)]
    return np.array([np.sin(index * f) for f in freq] + [np.cos(index * f) for f in freq])


def np_norm(p, x, groups=32):
    out = np.empty_like(x)
    size = x.shape[-1] // groups
    for g in range(groups):
        part = x[..., g * size : (g + 1) * size]
        out[..., g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
    return out * p["scale"] + p["bias"]


def np_conv(p, x, pad=((1, 1), (1, 1)), stride=1):
    x = np.pad(x, (*pad, (0, 0)))
    rows = range(0, x.shape[0] - 2, stride)
    columns = range(0, x.shape[1] - 2, stride)
    kernel = p["kernel"]
    return p["bias"] + np.array(
        [[np.tensordot(x[i : i + 3, j : j + 3], kernel, 3) for j in columns] for i in rows]
    )


def np_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def np_block(p, x, temb):
    h = np_conv(p["conv1"], swish(np_norm(p["norm1"], x)))
    h = h + np_dense(p["temb_proj"], swish(temb))
    h = np_conv(p["conv2"], swish(np_norm(p["norm2"], h)))
    return h + (np_dense(p["nin_shortcut"], x) if "nin_shortcut" in p else x)


def np_attention(p, x):
    height, width, channels = x.shape
    h = np_norm(p["norm"], x).reshape(-1, channels)
    q, k, v = (np_dense(p[name], h) for name in "qkv")
    out = np.empty_like(h)
    for i, query in enumerate(q):
        weight = np.exp(k @ query / np.sqrt(channels))
        out[i] = weight @ v / weight.sum()
    return x + np_dense(p["proj_out"], out).reshape(height, width, channels)


def np_unet(p, x, t, label=None):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    first, second = p["temb"]["dense"]["0"], p["temb"]["dense"]["1"]
    temb = np_dense(second, swish(np_dense(first, np_embedding(t - 1, first["kernel"].shape[0]))))
    if label is not None:
        temb = temb + p["label_embedding"][label]
    h = np_conv(p["conv_in"], x.astype(np.float64))
    skips = [h]
    for level in (p["down"][name] for name in sorted(p["down"])):
        for name in sorted(level["block"]):
            h = np_block(level["block"][name], h, temb)
            h = np_attention(level["attn"][name], h) if "attn" in level else h
            skips.append(h)
        if "downsample" in level:
            h = np_conv(level["downsample"]["conv"], h, pad=((0, 1), (0, 1)), stride=2)
            skips.append(h)
    h = np_block(p["mid"]["block_1"], h, temb)
    h = np_block(p["mid"]["block_2"], np_attention(p["mid"]["attn_1"], h), temb)
    for level in (p["up"][name] for name in sorted(p["up"], reverse=True)):
        for name in sorted(level["block"]):
            h = np_block(level["block"][name], np.concatenate([h, skips.pop()], -1), temb)
            h = np_attention(level["attn"][name], h) if "attn" in level else h
        if "upsample" in level:
            h = np_conv(level["upsample"]["conv"], np.kron(h, np.ones((2, 2, 1))))
    assert not skips
    return np_conv(p["conv_out"], swish(np_norm(p["norm_out"], h)))


# ---- the whole network ----


def test_cifar10_network_has_the_published_number_of_parameters():
    assert count_params(abstract_params(UNetConfig())) == 35_746_307


def test_parameter_names_and_shapes_are_the_authors():
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(UNetConfig()))
    shapes = {jax.tree_util.keystr(k, simple=True, separator="."): v.shape for k, v in leaves}
    assert shapes["temb.dense.1.kernel"] == (512, 512)
    assert shapes["down.1.block.0.nin_shortcut.kernel"] == (128, 256)
    assert shapes["down.1.attn.1.proj_out.kernel"] == (256, 256)
    assert shapes["down.2.downsample.conv.kernel"] == (3, 3, 256, 256)
    assert shapes["mid.attn_1.norm.scale"] == (256,)
    assert shapes["up.0.block.2.conv1.kernel"] == (3, 3, 256, 128)
    assert shapes["up.1.block.2.norm1.scale"] == (384,)
    assert shapes["up.3.block.0.temb_proj.kernel"] == (512, 256)
    assert shapes["up.1.upsample.conv.bias"] == (256,)
    assert shapes["conv_out.kernel"] == (3, 3, 128, 3)
    assert not any(
        n.startswith(("up.0.upsample", "down.3.downsample", "up.0.attn")) for n in shapes
    )
    assert all(leaf.dtype == jnp.float32 for _, leaf in leaves)


@pytest.mark.parametrize(
    ("change", "height", "width"),
    [
        ({}, 8, 12),
        pytest.param(
            {"image_size": 4, "in_channels": 1, "num_blocks": 2, "attention_resolutions": ()},
            *(4, 4),
            marks=pytest.mark.slow,
        ),
        ({"image_size": 4, "in_channels": 5, "multipliers": (2, 1, 3), "num_classes": 4}, 8, 4),
    ],
    ids=["not-square", "no-attention", "three-levels-five-channels-labels"],
)
def test_network_is_the_float64_reference(key, change, height, width):
    config = dataclasses.replace(TINY, **change)
    apply_fn, params = build(config, key)
    params, x, t = perturbed(params), images(2, height, width, config.in_channels), [1, 777]
    labels = None if config.num_classes is None else jnp.array([3, 0])
    got = jax.jit(apply_fn)(params, x, jnp.array(t), labels=labels)
    want = [np_unet(params, x[i], t[i], labels if labels is None else labels[i]) for i in (0, 1)]
    assert got.shape == x.shape
    assert got.dtype == jnp.float32
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, np.array(want), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (8, 8)])
def test_an_oblong_network_is_that_of_its_shorter_side(size):
    config = dataclasses.replace(TINY, image_size=size)
    assert config.image_shape == (*size, 3)
    assert config.resolutions == TINY.resolutions
    assert TINY.image_shape == (8, 8, 3)
    assert_same(build(config, jax.random.key(2))[1], build(TINY, jax.random.key(2))[1])


def test_ten_blocks_run_in_their_order(key):
    # As text "10" sorts before "2"; the reference is given names that sort by number.
    config = UNetConfig(4, 1, 32, (1,), num_blocks=10, attention_resolutions=())
    apply_fn, params = build(config, key)
    params, x = perturbed(params), images(1, 4, 4, 1)
    ordered = jax.tree.map(lambda leaf: leaf, params)
    for way in ("down", "up"):
        blocks = params[way]["0"]["block"]
        ordered[way]["0"]["block"] = {f"{int(name):02d}": block for name, block in blocks.items()}
    got = jax.jit(apply_fn)(params, x, jnp.array([9]))
    np.testing.assert_allclose(got[0], np_unet(ordered, x[0], 9), atol=2e-5)


def test_at_first_the_output_is_zero_and_kernels_are_glorot_uniform():
    config = dataclasses.replace(TINY, num_classes=9)
    apply_fn, params = build(config, jax.random.key(3))
    eps = jax.jit(apply_fn)(params, images(), jnp.array([1, 1000]))
    assert not eps.any()
    kernel = np.asarray(params["up"]["1"]["block"]["0"]["conv1"]["kernel"])  # 3x3, 128 -> 64
    bound = np.sqrt(6 / (9 * 128 + 9 * 64))
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    n = kernel.size  # a uniform variable's variance is bound²/3, that of its square 4 bound⁴/45
    assert abs((kernel**2).mean() - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / n)
    assert abs(kernel.mean()) < 5 * bound / np.sqrt(3 * n)
    labels = np.asarray(params["label_embedding"])
    assert abs((labels**2).mean() - 1) < 5 * np.sqrt(9 * 4 / 45 / labels.size)
    kernels = [leaf for leaf in map(np.asarray, jax.tree.leaves(params)) if leaf.ndim > 1]
    draws = [np.sign(kernel.ravel()[:64]).tobytes() for kernel in kernels if kernel.any()]
    assert len(set(draws)) == len(draws) > 20
    again, other = (build(config, jax.random.key(k))[1] for k in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert np.all(np.asarray(other["conv_in"]["kernel"]) != params["conv_in"]["kernel"])


# ---- its parts ----


def test_embedding_of_each_index():
    got = embed(jnp.array([0, 1, 999]), 128)
    want = [np_embedding(i, 128) for i in (0, 1, 999)]
    np.testing.assert_allclose(got, want, atol=1e-4)  # float32 resolves the angle 999 to 6e-5
    np.testing.assert_array_equal(got[0], [0.0] * 64 + [1.0] * 64)
    np.testing.assert_allclose(got[1, [0, 63, 64]], [np.sin(1), np.sin(1e-4), np.cos(1)], rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_group_norm_keeps_its_digits_far_from_zero(mean):
    x = (mean + images(2, 4, 6, 64)).astype(np.float32)
    norm = GroupNorm(64)
    norm.scale[...] = jnp.linspace(0.5, 2, 64)
    norm.bias[...] = jnp.linspace(-1, 1, 64)
    p = {"scale": np.linspace(0.5, 2, 64), "bias": np.linspace(-1, 1, 64)}
    want = np.array([np_norm(p, one) for one in x.astype(np.float64)])
    np.testing.assert_allclose(norm(x), want, atol=1e-5 if mean == 0 else 2e-3)


def test_group_norm_of_other_groups():
    """And why a narrow network with classes wants them: one channel alone forgets its constant."""
    x = images(2, 4, 6, 24)
    plain = {"scale": np.ones(24), "bias": np.zeros(24)}
    for groups in (1, 8, 24):
        want = np.array([np_norm(plain, one, groups) for one in x.astype(np.float64)])
        np.testing.assert_allclose(GroupNorm(24, groups)(x), want, atol=1e-5)
    moved = x + np.linspace(-1, 1, 24, dtype=np.float32)
    np.testing.assert_allclose(GroupNorm(24, 24)(moved), GroupNorm(24, 24)(x), atol=1e-5)
    assert abs(GroupNorm(24, 8)(moved) - GroupNorm(24, 8)(x)).max() > 0.1


def test_group_norm_of_parts_is_that_of_the_whole():
    """Also where a group lies on both sides of a cut."""
    x, norm = jnp.asarray(images(2, 4, 6, 24)), GroupNorm(24, 4)
    together = norm(x[..., :7], x[..., 7:], then=jax.nn.swish)
    np.testing.assert_allclose(together, jax.nn.swish(norm(x)), atol=1e-6)


def test_group_norm_of_what_is_shifted():
    """In float32 to the last bit; in bfloat16 only the result is rounded, not x + s."""
    x, s, norm = images(2, 4, 6, 64) + 30, images(2, 1, 1, 64, seed=2), GroupNorm(64)
    shifted = norm(jnp.asarray(x), shift=jnp.asarray(s), then=jax.nn.swish)
    np.testing.assert_array_equal(shifted, norm(jnp.asarray(x + s), then=jax.nn.swish))
    half, by = jnp.asarray(x, jnp.bfloat16), jnp.asarray(s, jnp.bfloat16)
    y = np.float64(half) + np.float64(by)
    want = np.array([np_norm({"scale": 1, "bias": 0}, one) for one in y])
    got = norm(half, shift=by)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), want, rtol=2**-8, atol=1e-3)


def test_group_norm_where_the_first_row_is_another_or_nothing_varies():
    """One row in H far away takes log2 H bits; a constant gives no root of less than 0."""
    x = images(2, 8, 6, 32)
    x[:, 0] += 1e3
    want = np.array([np_norm({"scale": 1, "bias": 0}, one) for one in x.astype(np.float64)])
    np.testing.assert_allclose(GroupNorm(32)(x), want, atol=1e3 * 8 * 1.2e-7)
    constant = jnp.full((1, 8, 6, 32), 1e6 / 3, jnp.float32)
    assert jnp.isfinite(GroupNorm(32)(constant)).all()


def test_group_norm_derivatives_of_first_and_second_order():
    norm, (x, v, w) = GroupNorm(32), (images(1, 2, 2, 32, seed) for seed in (1, 2, 3))
    p, step = {"scale": np.ones(32), "bias": np.zeros(32)}, 1e-3
    below, here, above = (
        (w * np_norm(p, (x + np.float64(a) * v)[0])).sum() for a in (-step, 0.0, step)
    )
    first = jax.grad(lambda a: (w * norm(x + a * v)).sum())
    np.testing.assert_allclose(jax.jit(first)(0.0), (above - below) / (2 * step), rtol=1e-3)
    second = (above - 2 * here + below) / step**2
    np.testing.assert_allclose(jax.jit(jax.grad(first))(0.0), second, rtol=1e-3)


def test_upsample_repeats_pixels():
    x = images(2, 3, 5, 4)
    np.testing.assert_array_equal(upsample(x), x.repeat(2, 1).repeat(2, 2))


# ---- what it promises ----


def test_images_and_their_times_do_not_mix(tiny):
    apply_fn, params = tiny
    x, t = images(3), jnp.array([5, 500, 1000])
    together = apply_fn(params, x, t)
    changed = apply_fn(params, x * np.float32([1, 0, 1])[:, None, None, None], t.at[1].set(7))
    np.testing.assert_array_equal(together[0::2], changed[0::2])
    assert abs(together[1] - changed[1]).max() > 0.1
    alone = apply_fn(params, x[2:], t[2:])
    np.testing.assert_allclose(together[2:], alone, atol=1e-5)


def test_bfloat16_is_close_and_gives_float32(tiny):
    apply_fn, params = tiny
    half_fn, half_params = build(dataclasses.replace(TINY, dtype="bfloat16"), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
    x, t = images(), jnp.array([3, 900])
    full, half = apply_fn(params, x, t), jax.jit(half_fn)(params, x, t)
    assert half.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((half - full) ** 2) / jnp.mean(full**2))
    assert 1e-4 < error < 0.03  # bfloat16 has 8 bits: 0.4 % a rounding
    text = str(jax.make_jaxpr(half_fn)(half_params, x, t))
    results = [line.split("=")[0] for line in text.splitlines() if "conv_general_dilated[" in line]
    assert len(results) > 10
    assert all(":bf16[" in result for result in results)


def test_weights_as_they_are_computed_with_need_no_conversion(tiny):
    config, params = dataclasses.replace(TINY, dtype="bfloat16"), tiny[1]
    half_fn, ready = make_apply(config), computed(params, config)
    x, t = images(), jnp.array([3, 900])
    np.testing.assert_array_equal(half_fn(ready, x, t), half_fn(params, x, t))
    assert ready["norm_out"]["bias"] is params["norm_out"]["bias"]

    def conversions(params):
        lines = str(jax.make_jaxpr(half_fn)(params, x, t)).splitlines()
        return [line for line in lines if ":bf16[3,3," in line and "convert_element_type" in line]

    assert len(conversions(params)) > 3
    assert not conversions(ready)


def conversions_in_loops(jaxpr, inside=False):
    """Kernels that are rounded to bfloat16 in the body of a scan."""
    found = 0
    for e in jaxpr.eqns:
        found += inside and e.primitive.name == "convert_element_type" and (
            e.outvars[0].aval.dtype == jnp.bfloat16 and e.invars[0].aval.shape[:2] == (3, 3)
        )  # fmt: skip
        loop = inside or e.primitive.name == "scan"
        for value in e.params.values():
            found += sum(conversions_in_loops(one, loop) for one in _jaxprs(value))
    return found


def test_samplers_convert_the_weights_before_their_loop(tiny):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    model = ddim.Model(make_apply(config), tiny[1], ddim.linear_schedule(1000), config)
    x_T = images()

    def program(model):
        return jax.make_jaxpr(ddim.make_sampler(model, [1, 500, 1000]))(x_T).jaxpr

    assert conversions_in_loops(program(model)) == 0
    assert conversions_in_loops(program(model._replace(config=None))) > 3


@pytest.mark.parametrize(
    "params", [None, 2.0, (1.0, 1.0), {"kernel": {"deep": 2.0}}, {"kernel": np.float32(1 / 3)}]
)
def test_weights_of_another_network_stay_as_they_are(params):
    """Which says bfloat16 of our U-Net, and takes weights of its own form."""
    config = dataclasses.replace(TINY, dtype="bfloat16")

    def apply_fn(params, x, t):
        return x * sum(jax.tree.leaves(params))

    model = ddim.Model(apply_fn, params, ddim.linear_schedule(1000), config)
    assert model.computed(params) is params
    x_T, tau = images(), [1, 1000]
    got = ddim.make_sampler(model, tau)(x_T)
    np.testing.assert_array_equal(got, ddim.make_sampler(model._replace(config=None), tau)(x_T))


def test_it_is_traced_once_for_all_programs():
    apply_fn, x, t = make_apply(TINY), images(), np.array([3, 900])
    assert make_apply(dataclasses.replace(TINY)) is apply_fn

    def network(scale):
        program = jax.make_jaxpr(lambda params: scale * apply_fn(params, x, t))
        (found,) = [
            equation.params["jaxpr"]
            for equation in program(abstract_params(TINY)).eqns
            if equation.params.get("name") == "network"
        ]
        return found

    assert network(2) is network(3)


def test_dropout_follows_its_key(tiny, key):
    apply_fn, params = tiny
    x, t = images(), jnp.array([3, 900])
    one, same, other = (
        apply_fn(params, x, t, dropout_key=k) for k in (key, key, jax.random.key(1))
    )
    none = apply_fn(params, x, t)
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(none, apply_fn(params, x, t, dropout_key=None))
    assert all(abs(a - b).max() > 1e-2 for a, b in [(one, other), (one, none), (other, none)])


def test_dropout_drops_its_rate_scales_the_rest_and_differs_between_blocks():
    # All weights zero but: norm2 of one block gives swish⁻¹(1) and its conv2 passes that, dropped
    # or divided by 0.7, to channel 2, with 1/0.7 in channel 3 of the same group; the rest of the
    # network carries both to the output, their difference: 0 where kept, negative where dropped.
    config = UNetConfig(16, 1, 64, (1,), 1, (), dropout=0.3)
    apply_fn, _ = build(config, jax.random.key(0))
    apply_fn = jax.jit(apply_fn)

    def kept(block):
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), abstract_params(config))
        params["mid"][block]["norm2"]["bias"][:] = 1.278464542761074
        params["mid"][block]["conv2"]["kernel"][1, 1, 0, 2] = 1
        params["mid"][block]["conv2"]["bias"][3] = 1 / 0.7
        for i in "01":
            params["up"]["0"]["block"][i]["nin_shortcut"]["kernel"][:64] = np.eye(64)
        params["norm_out"]["scale"][2:4] = 1
        params["conv_out"]["kernel"][1, 1, 2:4, 0] = 1, -1
        x, t = jnp.zeros((16, 16, 16, 1)), jnp.ones(16, jnp.int32)
        return np.asarray(apply_fn(params, x, t, jax.random.key(5)))[..., 0] > -0.01

    one, two = kept("block_1"), kept("block_2")
    for mask in (one, two):
        assert abs(mask.mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / mask.size)
    assert abs((one & two).mean() - 0.49) < 4 * np.sqrt(0.49 * 0.51 / one.size)


def convolutions(jaxpr):
    """How many run, those of a program that is called twice counted twice."""
    return sum(
        e.primitive.name == "conv_general_dilated"
        or sum(convolutions(inner) for value in e.params.values() for inner in _jaxprs(value))
        for e in jaxpr.eqns
    )


def test_remat_recomputes_and_changes_neither_output_nor_gradient(key):
    config = dataclasses.replace(TINY, multipliers=(1,), attention_resolutions=())
    params = perturbed(abstract_params(config))
    x, t = images(), jnp.array([3, 900])

    def run(remat):
        apply_fn, _ = build(dataclasses.replace(config, remat=remat), key)

        def loss(params):
            eps = apply_fn(params, x, t, key)  # with dropout: the same masks the second time
            return (eps**2).mean(), eps

        traced = jax.jit(jax.grad(loss, has_aux=True)).trace(params)
        return traced.lower().compile()(params), convolutions(traced.jaxpr)

    ((plain, eps), few), ((remat, again), many) = run(False), run(True)
    assert many >= few + 5  # the first convolution of each of five residual blocks
    np.testing.assert_allclose(eps, again, atol=1e-5)
    scale = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4), plain, remat
    )


def test_the_gradient_is_the_slope_of_the_reference_and_reaches_every_weight(tiny):
    apply_fn, params = tiny
    x, t, w = images(1), [321], images(1, seed=4)
    grad = jax.jit(jax.grad(lambda p: (apply_fn(p, x, jnp.array(t)) * w).sum()))(params)
    flat = {jax.tree_util.keystr(k): g for k, g in jax.tree_util.tree_leaves_with_path(grad)}
    dead = [name for name, g in flat.items() if not (np.isfinite(g).all() and np.any(g))]
    # Softmax does not see what is added to all logits of a query, as k's bias does.
    assert [name for name in dead if "['k']['bias']" not in name] == []

    params64, v = (jax.tree.map(np.float64, p) for p in (params, perturbed(params, seed=5)))

    def along(a):
        return (np_unet(jax.tree.map(lambda p, d: p + a * d, params64, v), x[0], t[0]) * w).sum()

    slope = sum((g * d).sum() for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(v)))
    np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-3)


def test_labels(key):
    config = dataclasses.replace(TINY, num_classes=3)
    apply_fn, params = build(config, key)
    apply_fn, params = jax.jit(apply_fn), perturbed(params)
    x, t = images(4), jnp.array([10, 10, 10, 10])
    eps = apply_fn(params, x[:1].repeat(4, 0), t, labels=jnp.arange(4))
    assert all(abs(eps[i] - eps[j]).max() > 1e-2 for i in range(4) for j in range(i))
    none = apply_fn(params, x, t)
    np.testing.assert_array_equal(none, apply_fn(params, x, t, labels=jnp.full(4, 3)))
    bad = apply_fn(params, x, t, labels=jnp.array([0, 4, -1, 3]))
    assert np.isnan(bad).any((1, 2, 3)).tolist() == [False, True, True, False]


def test_one_compilation_whatever_the_weights_times_and_keys(tiny):
    _, params = tiny
    apply_fn, _ = build(TINY, jax.random.key(0))
    count = 0

    @jax.jit
    def counted(params, x, t, dropout_key):
        nonlocal count
        count += 1
        return apply_fn(params, x, t, dropout_key)

    outputs = []
    for i in (1, 2, 3):
        weights = perturbed(params, seed=i)
        eps = counted(weights, images(seed=i), jnp.array([i, 10 * i]), jax.random.key(i))
        outputs.append(np.asarray(eps).tobytes())
    assert count == 1
    assert len(set(outputs)) == 3


def test_weights_are_arguments_not_constants(tiny):
    apply_fn, params = tiny
    text = apply_fn.lower(params, images(), jnp.array([1, 2])).as_text()
    assert len(text) < count_params(params)  # as constants they alone take 8 characters each


@pytest.mark.slow
def test_the_network_is_exported_for_any_number_of_images():
    config = dataclasses.replace(UNET, in_channels=1)
    apply_fn, params = build(config, jax.random.key(0))
    params = perturbed(params)
    shape = jax.export.symbolic_shape("b, 8, 8, 1")
    x, t = jax.ShapeDtypeStruct(shape, "float32"), jax.ShapeDtypeStruct(shape[:1], "int32")
    exported = jax.export.export(jax.jit(apply_fn))(params, x, t)
    x, t = images(3, channels=1), jnp.array([1, 5, 9])
    want = jax.jit(apply_fn)(params, x, t)
    for count in (2, 3):
        got = exported.call(params, x[:count], t[:count])
        np.testing.assert_allclose(got, want[:count], atol=1e-5)


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_size": 30, "multipliers": (1, 1, 1)}, ValueError, "multiple of 4.*got 30.* 32"),
        ({"channels": 48}, ValueError, "multiple of 32.*got 48, try 64"),
        ({"norm_groups": 7}, ValueError, "multiple of 7.*try "),
        ({"norm_groups": 0}, ValueError, "norm_groups must be an int >= 1, got 0"),
        ({"channels": 64.0}, ValueError, "channels must be an int >= 1, got 64.0"),
        ({"image_size": 0}, ValueError, "image_size"),
        ({"image_size": (8, 9)}, ValueError, r"image_size\[1\] must be a multiple of 2.*got 9"),
        ({"image_size": (0, 8)}, ValueError, r"image_size\[0\] must be an int >= 1, got 0"),
        ({"image_size": [8, 16]}, TypeError, r"int or a tuple \(height, width\), got \[8, 16\]"),
        ({"image_size": (8, 8, 3)}, TypeError, r"tuple \(height, width\), got \(8, 8, 3\)"),
        ({"image_size": 8.0}, TypeError, "image_size must be an int or a tuple"),
        ({"image_size": True}, ValueError, "image_size must be an int >= 1, got True"),
        ({"image_size": (16, 8), "attention_resolutions": (16,)}, ValueError, r"\(8, 4\), got"),
        ({"in_channels": 0}, ValueError, "in_channels"),
        ({"num_blocks": 0}, ValueError, "num_blocks"),
        ({"num_classes": 0}, ValueError, "num_classes"),
        ({"multipliers": ()}, ValueError, "at least one level"),
        ({"multipliers": (1, 0)}, ValueError, r"multipliers\[1\]"),
        ({"multipliers": [1, 2]}, TypeError, "multipliers must be a tuple"),
        ({"attention_resolutions": 4}, TypeError, "attention_resolutions must be a tuple"),
        (
            {"attention_resolutions": (16,)},
            ValueError,
            r"among this network's \(8, 4\), got \[16\]",
        ),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dtype": "float16"}, ValueError, "'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_bad_config(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 8, 7, 3), "f4")}, ValueError, "width of x.*multiple of 2.*got 7.* 8"),
        ({"x": np.zeros((2, 9, 8, 3), "f4")}, ValueError, "height of x.*multiple of 2.*got 9"),
        ({"x": np.zeros((8, 8, 3), "f4")}, ValueError, r"\(batch, height, width, 3\)"),
        ({"x": np.zeros((2, 8, 8, 1), "f4")}, ValueError, r"got \(2, 8, 8, 1\)"),
        ({"x": np.zeros((2, 8, 8, 3), "u1")}, TypeError, "floating.*uint8"),
        ({"t": 5}, ValueError, r"t must have shape \(2,\).*got \(\)"),
        ({"t": [[1], [2]]}, ValueError, "t must have shape"),
        ({"t": [1, 2, 3]}, ValueError, "t must have shape"),
        ({"t": [0.5, 1.0]}, ValueError, "1 is subtracted in apply_fn; got 0.5"),
        ({"t": [True, True]}, TypeError, "t must be integer.*bool"),
        ({"t": [0, 1]}, ValueError, "1 is subtracted in apply_fn; got 0"),
        ({"labels": [0, 1]}, ValueError, "unconditional"),
    ],
)
def test_bad_arguments(tiny, change, error, message):
    apply_fn, _ = build(TINY, jax.random.key(0))
    _, params = tiny
    arguments = {"x": images(), "t": [1, 2]} | change
    arrays = {k: v if k == "x" else jnp.asarray(v) for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        apply_fn(params, **arrays)


def test_a_time_that_does_not_fit_into_32_bits_is_not_wrapped_around(tiny):
    apply_fn, _ = build(dataclasses.replace(TINY, num_classes=3), jax.random.key(0))
    params, big = (
        abstract_params(dataclasses.replace(TINY, num_classes=3)),
        np.array([1, 2**32 + 1]),
    )
    with pytest.raises(ValueError, match="t must be .*got 4294967297"):
        apply_fn(params, images(), big)
    with pytest.raises(ValueError, match="labels must be .*got 4294967297"):
        apply_fn(params, images(), np.array([1, 2]), labels=big)


def test_a_traced_time_below_1_gives_nan_for_its_image_alone(tiny):
    apply_fn, params = tiny
    eps = apply_fn(params, images(), jnp.array([0, 5]))
    assert np.isnan(eps[0]).all()
    np.testing.assert_array_equal(eps[1], apply_fn(params, images(), jnp.array([9, 5]))[1])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 4], ValueError, "0..3, 3 for no label; got 4"),
        ([-1, 0], ValueError, "got -1"),
        ([0.0, 1.0], TypeError, "integer"),
        ([1], ValueError, r"labels must have shape \(2,\)"),
    ],
)
def test_bad_labels(labels, error, message):
    config = dataclasses.replace(TINY, num_classes=3)
    apply_fn, _ = build(config, jax.random.key(0))
    with pytest.raises(error, match=message):
        apply_fn(abstract_params(config), images(), jnp.array([1, 2]), labels=jnp.asarray(labels))


def test_weights_of_another_network(tiny):
    apply_fn, _ = build(TINY, jax.random.key(0))
    wider = abstract_params(dataclasses.replace(TINY, channels=64))
    with pytest.raises(ValueError, match=r"conv_in.*it has \(32,\), got \(64,\)"):
        apply_fn(wider, images(), jnp.array([1, 2]))
    extra = {**tiny[1], "a_new_layer": {"bias": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="a_new_layer.*it has nothing"):
        apply_fn(extra, images(), jnp.array([1, 2]))
