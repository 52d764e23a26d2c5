"""The U-Net's switches, against outputs of diffusers' UNet2DModel that are stored with the tests.

tests/diffusers_networks.py drew the networks, filled them and wrote the file; tests/
test_peers_networks.py does the same for many more where diffusers is installed.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.generation.artifact import export_sampler
from ddim_jax.generation.condition import condition
from ddim_jax.networks.blocks import average, timestep_embedding
from ddim_jax.networks.flops import count_flops
from ddim_jax.networks.unet import UNetConfig, abstract_params, build, count_params, make_apply
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.training.resuming import check_facts
from ddim_jax.training.starting import start_from
from ddim_jax.weights import from_facts, to_facts
from ddim_jax.weights.diffusers_config import unet_config, unet_settings
from ddim_jax.weights.diffusers_format import diffusers_name
from ddim_jax.weights.state_dict import from_state_dict, to_state_dict
from tests import pseudo_weights
from tests.diffusers_networks import STORED, inputs

CASES = json.loads(STORED.read_text())
DEAR = (0, 1, 4, 6)  # three levels, or two blocks in each


def pseudo_params(config):
    """What the real diffusers was filled with, by its names."""
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), abstract_params(config))
    linear = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    shapes = {
        diffusers_name(name, config): a.shape[:2] if name.endswith(linear) else a.shape
        for name, a in to_state_dict(blank).items()
    }
    state = pseudo_weights.state(shapes)
    return from_state_dict(state, config, lambda name: diffusers_name(name, config))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (i in DEAR), id=str(i))
        for i, case in enumerate(CASES)
    ],
)
def test_outputs_of_diffusers(case):
    """In float64 there, in float32 here: a hundred layers of 6e-8, grown by the norms."""
    config = unet_config(case["settings"])
    x, i, labels = inputs(case["settings"])
    given = {} if labels is None else {"labels": labels}
    got = jax.jit(make_apply(config))(pseudo_params(config), x, jnp.asarray(i + 1), **given)
    want = np.array(case["output"])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


SMALL = UNetConfig(8, 3, 8, (1, 2), 1, (4,), norm_groups=4)
X, T = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32"), jax.ShapeDtypeStruct((2,), "int32")


def shapes(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {jax.tree_util.keystr(k, simple=True, separator="."): v.shape for k, v in leaves}


def test_facts_hold_what_differs_alone_and_are_read_again():
    """A file of Ho et al.'s network is what it was; older files have less, and are read too."""
    assert [*UNetConfig().facts()] == [f.name for f in dataclasses.fields(UNetConfig)][:11]
    other = dataclasses.replace(
        SMALL, multipliers=(1, 1.5), resample_up=("pool",), attention_resolutions_up=(), num_heads=2
    )
    facts = json.loads(json.dumps(to_facts(ScheduleConfig(), other)))
    assert from_facts(facts)[1] == other
    assert hash(from_facts(facts)[1]) == hash(other)
    del facts["model"]["norm_groups"]
    with pytest.raises(ValueError, match="multiple of 32"):  # once it was always that
        from_facts(facts)


OTHER = {  # of each field another value, and what goes with it
    "image_size": {"image_size": (8, 16)}, "in_channels": {"in_channels": 1},
    "channels": {"channels": 12}, "multipliers": {"multipliers": (1, 1.5)},
    "num_blocks": {"num_blocks": 2}, "attention_resolutions": {"attention_resolutions": (8,)},
    "dropout": {"dropout": 0.2}, "num_classes": {"num_classes": 3, "null_label": False},
    "norm_groups": {"norm_groups": 2}, "out_channels": {"out_channels": 6},
    "norm_eps": {"norm_eps": 1e-5}, "activation": {"activation": "mish"},
    "scale_shift": {"scale_shift": True}, "num_heads": {"num_heads": 2},
    "head_width": {"head_width": 4}, "num_heads_up": {"num_heads_up": 2},
    "attention_resolutions_up": {"attention_resolutions_up": (8,)}, "middle": {"middle": "plain"},
    "middle_scale": {"middle_scale": 2.0}, "middle_norm_groups": {"middle_norm_groups": 8},
    "resample_down": {"resample_down": ("block",)}, "resample_up": {"resample_up": ("block",)},
    "downsample_padding": {"downsample_padding": (1, 1)}, "cosine_first": {"cosine_first": True},
    "frequency_shift": {"frequency_shift": 0}, "sinusoids": {"sinusoids": 12},
    "time_width": {"time_width": 12}, "time_scale": {"time_scale": 2.0},
    "time_table": {"time_table": 9}, "class_embedding": {"class_embedding": "identity"},
    "null_label": {"num_classes": 3, "null_label": False}, "centre_input": {"centre_input": True},
}  # fmt: skip
LACKING = {"sinusoids", "time_scale", "num_heads_up"}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(UNetConfig)])
def test_no_field_is_lost_on_the_way_to_diffusers(name):
    """It is in config.json, or named as one that diffusers has not, or of the computation alone."""
    if name in ("dtype", "remat"):
        return
    config = dataclasses.replace(SMALL, **{"dropout": 0.0, **OTHER[name]})
    if name in LACKING:
        with pytest.raises(ValueError, match=f"no such network: .*{name.removesuffix('_up')[4:]}"):
            unet_settings(config)
    elif name == "num_heads":  # which is their width there
        same = dataclasses.replace(SMALL, dropout=0.0, head_width=8)
        assert unet_config(unet_settings(config)) == same
    else:
        assert unet_config(json.loads(json.dumps(unet_settings(config)))) == config


def test_shapes_of_what_diffusers_has_not():
    """Heads by number, sinusoids of their own, resampling without weights."""
    plain = shapes(SMALL)
    pooled = dataclasses.replace(SMALL, resample_down="pool", resample_up="pool")
    gone = {"down.0.downsample.conv", "up.1.upsample.conv"}
    assert {name.rpartition(".")[0] for name in plain.keys() - shapes(pooled).keys()} == gone
    assert shapes(dataclasses.replace(SMALL, num_heads=2, num_heads_up=4)) == plain
    own = dataclasses.replace(SMALL, sinusoids=20, time_width=12)
    assert shapes(own)["temb.dense.0.kernel"] == (20, 12)
    assert shapes(own)["down.0.block.0.temb_proj.kernel"] == (12, 8)
    assert shapes(dataclasses.replace(SMALL, out_channels=6))["conv_out.kernel"] == (3, 3, 8, 6)
    labels = dataclasses.replace(SMALL, num_classes=3, null_label=False)
    assert shapes(labels)["label_embedding"] == (3, 32)
    for config in (pooled, own, labels):
        y = jax.eval_shape(
            make_apply(config),
            abstract_params(config),
            X,
            T,
            labels=None if config is not labels else T,
        )
        assert y.shape == X.shape


def test_a_number_of_heads_is_their_width():
    """Channels go to heads in turn: of width 16 at the level and in the middle."""
    several = dataclasses.replace(SMALL, num_heads=4)
    by_width = dataclasses.replace(SMALL, head_width=4)
    assert several.attentions == by_width.attentions == ((16, 4),) * 3
    assert dataclasses.replace(SMALL, num_heads_up=2).attentions == ((16, 1), (16, 2), (16, 1))
    rest = dataclasses.replace(SMALL, head_width=12)  # 12 of 16 channels, as diffusers does it
    assert rest.attentions == ((16, 1),) * 3
    assert shapes(rest)["mid.attn_1.q.kernel"] == (16, 12)
    args = abstract_params(SMALL), X, T
    programs = [str(jax.make_jaxpr(make_apply(c))(*args)) for c in (several, by_width, SMALL)]
    assert programs[0] == programs[1] != programs[2]
    assert count_flops(make_apply(several), *args) == count_flops(make_apply(SMALL), *args)


def test_average_and_embedding():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype("f4")
    blocks = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2, 4)] for i in (0, 2)]
    np.testing.assert_allclose(average(x), np.array(blocks).transpose(2, 0, 1, 3), atol=1e-6)
    got = timestep_embedding(jnp.array([0, 3]), 7, shift=0, cosine_first=True)
    angles = 3 * 10000.0 ** (-np.arange(3) / 3)
    want = [[1, 1, 1, 0, 0, 0, 0], [*np.cos(angles), *np.sin(angles), 0]]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_flops_of_the_new_parts():
    """A residual block between levels costs its two convolutions more than the one it replaces."""
    args = abstract_params(SMALL), X, T
    plain = count_flops(make_apply(SMALL), *args)
    for change, convolutions in (({"resample_down": "block"}, 2), ({"resample_down": "pool"}, 0)):
        config = dataclasses.replace(SMALL, **change)
        got = count_flops(make_apply(config), abstract_params(config), X, T)
        inner = 2 * 8 * 8 * (4 + 3 * 2) ** 2  # FLOP of one 3×3 at 4×4 pixels, without the padding
        strided = 2 * 8 * 8 * (3 * 4 - 1) ** 2  # of the strided one, padded below and right
        time = 2 * 32 * 8 if convolutions else 0
        assert got - plain == 2 * (convolutions * inner + time - strided)


def test_initial_weights():
    """The output is 0 at first, and tables have variance 1."""
    config = dataclasses.replace(
        SMALL, resample_down="block", resample_up="block", scale_shift=True, time_table=40,
        class_embedding="timestep", middle_norm_groups=0, out_channels=6,
    )  # fmt: skip
    apply_fn, params = build(config, jax.random.key(0))
    assert count_params(params) == count_params(abstract_params(config))
    table = np.asarray(params["time_table"])
    assert abs((table**2).mean() - 1) < 5 * np.sqrt(4 / 5 / table.size)
    assert not params["down"]["0"]["downsample"]["block"]["conv2"]["kernel"].any()
    assert params["down"]["0"]["downsample"]["block"]["conv1"]["kernel"].any()
    assert not params["conv_out"]["kernel"].any()
    assert "norm" not in params["mid"]["attn_1"]
    with pytest.raises(ValueError, match=r"t must be in 1\.\.40, the rows of its table; got 41"):
        apply_fn(params, np.zeros(X.shape, "f4"), np.array([1, 41]), labels=np.array([0, 39]))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.39; got 40"):
        apply_fn(params, np.zeros(X.shape, "f4"), np.array([1, 40]), labels=np.array([0, 40]))
    with pytest.raises(TypeError, match="t must be integer"):
        apply_fn(params, np.zeros(X.shape, "f4"), np.array([1.5, 40]), labels=np.array([0, 39]))


def test_without_a_row_for_no_label_nothing_is_drawn_guided_or_hidden_without_one(tmp_path):
    config = dataclasses.replace(SMALL, num_classes=3, null_label=False)
    apply_fn, params = build(config, jax.random.key(0))
    facts = to_facts(ScheduleConfig(), config)
    model = ddim.Model(apply_fn, params, ddim.linear_schedule(1000), config, facts)
    assert condition(model, "all").labels == (0, 1, 2)
    for labels in (None, "none", 3, [0, 3]):
        with pytest.raises(ValueError, match=r"no row for none of them: give labels in 0\.\.2"):
            condition(model, labels)
    with pytest.raises(ValueError, match="guidance leads away .* leave it out"):
        condition(model, 1, guidance=2.0)
    with pytest.raises(ValueError, match="guidance leads away"):
        export_sampler(model, [1, 1000], tmp_path / "x.stablehlo")
    embedded = model._replace(config=dataclasses.replace(SMALL, class_embedding="identity"))
    with pytest.raises(ValueError, match="labels of this network are no classes"):
        condition(embedded)
    with pytest.raises(ValueError, match=r"keep num_classes=3, got 4"):
        start_from(model, dataclasses.replace(config, num_classes=4))
    again = start_from(model, dataclasses.replace(config, dropout=0.2))
    assert again.facts["model"]["null_label"] is False
    dataset = load("digits")
    told = {"train": {"label_dropout": 0.1}, **facts}
    with pytest.raises(ValueError, match=r"set label_dropout=0 \(--train.label-dropout 0\)"):
        check_facts(told, params, model.schedule, dataset, 3, tmp_path, print)


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        (
            {"num_classes": 3, "null_label": False},
            None,
            r"without labels: give \(B,\) in 0\.\.2, as",
        ),
        ({"num_classes": 3, "null_label": False}, [0, 3], r"in 0\.\.2, .* got 3"),
        ({"class_embedding": "timestep"}, None, r"without labels: give \(B,\) numbers >= 0"),
        ({"class_embedding": "timestep"}, [1.5, -1.0], "numbers >= 0, embedded as time is; got -1"),
        ({"class_embedding": "identity"}, None, r"without labels: give \(B, 32\) embeddings"),
        ({"class_embedding": "identity"}, [0, 1], r"must be embeddings \(2, 32\), got \(2,\)"),
        ({}, [0, 1], "labels given to an unconditional network"),
    ],
)
def test_bad_labels(change, labels, message):
    config = dataclasses.replace(SMALL, **change)
    x, t = np.zeros(X.shape, "f4"), np.array([1, 2])
    labels = None if labels is None else np.array(labels)
    with pytest.raises(ValueError, match=message):
        make_apply(config)(abstract_params(config), x, t, labels=labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out_channels": 0}, ValueError, "out_channels must be an int >= 1, got 0"),
        ({"norm_eps": 0}, ValueError, "norm_eps must be a number above 0, got 0"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps must be a number above 0, got nan"),
        (
            {"activation": "silu"},
            ValueError,
            "activation must be .swish., .mish., .gelu. or",
        ),
        ({"scale_shift": 1}, TypeError, "scale_shift must be True or False, got 1"),
        ({"num_heads": 3}, ValueError, "num_heads must divide 16, .* got 3"),
        ({"num_heads_up": 3}, ValueError, "num_heads_up must divide 16, .* got 3"),
        ({"head_width": 17}, ValueError, "head_width must be at most 16, .* got 17"),
        ({"head_width": 4, "num_heads": 2}, ValueError, "in place of num_heads"),
        (
            {"attention_resolutions_up": (16,)},
            ValueError,
            "attention_resolutions_up must be am",
        ),
        ({"attention_resolutions_up": [4]}, TypeError, "attention_resolutions_up must be a tuple"),
        ({"middle": "conv"}, ValueError, "middle must be 'attention', 'plain' or 'none'"),
        ({"middle_scale": -1.0}, ValueError, "middle_scale must be a number above 0"),
        ({"middle_norm_groups": 3}, ValueError, "middle_norm_groups must divide 16, .* got 3"),
        ({"middle_norm_groups": -1}, ValueError, "must be an int >= 0 or None, got -1"),
        ({"resample_down": "avg"}, ValueError, "resample_down must be 'conv', .* of 1 of them"),
        ({"resample_up": ("conv", "conv")}, ValueError, "resample_up must be .* got .*'conv'"),
        ({"resample_up": ["conv"]}, ValueError, r"resample_up must be .* got \['conv'\]"),
        ({"downsample_padding": 1}, ValueError, r"must be \(0, 1\) or \(1, 1\), got 1"),
        ({"frequency_shift": 4}, ValueError, "frequency_shift must be below 4, half of the"),
        ({"frequency_shift": "1"}, ValueError, "frequency_shift must be a number, got '1'"),
        ({"sinusoids": 2}, ValueError, "frequency_shift must be below 1, half of the sinusoids"),
        ({"time_table": 2.0}, ValueError, "time_table must be an int >= 1, got 2.0"),
        (
            {"time_table": 9, "time_scale": 2.0},
            ValueError,
            "time_scale must be 1 with a time_",
        ),
        ({"class_embedding": "none"}, ValueError, "class_embedding must be 'table', 'timestep' or"),
        ({"class_embedding": "identity", "num_classes": 3}, ValueError, "num_classes must be None"),
        ({"multipliers": (1, 1.3)}, ValueError, r"multipliers\[1\] \* channels must be a multiple"),
        ({"multipliers": (1, float("inf"))}, ValueError, r"multipliers\[1\] must be"),
        ({"multipliers": (1, 1.25)}, ValueError, "a multiple of 4, the number of groups"),
    ],
)
def test_bad_switches(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **change)
