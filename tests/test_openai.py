"""OpenAI's networks: what their own code computed, from the same weights and noise.

The references are of `tests/data/make_openai.py`. Within 1e-5 of the largest output, what two
orders of summation differ by in float32; samplers within 1e-4, as x̂_0 divides by √ᾱ_T.
"""

import contextlib
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.networks.classifier import ClassifierConfig, abstract_classifier
from ddim_jax.networks.unet import abstract_params
from ddim_jax.process import Prediction
from ddim_jax.process.stepping import towards
from ddim_jax.sampling.learned import with_variance
from ddim_jax.storage.weights_file import write_safetensors
from ddim_jax.weights.classifier import classifier_name, load_classifier, read_classifier
from ddim_jax.weights.model import network_of, stored
from ddim_jax.weights.openai_config import respaced, schedule_of, unet_of
from ddim_jax.weights.openai_flags import DEFAULTS, check_flags, read_flags
from ddim_jax.weights.openai_format import openai_name, read_openai, shapes_say
from ddim_jax.weights.openai_published import CLASSIFIERS as PUBLISHED_CLASSIFIERS
from ddim_jax.weights.openai_published import PUBLISHED
from ddim_jax.weights.state_dict import _named
from tests.openai_cases import (
    CASES,
    CLASSIFIERS,
    GUIDED,
    SAMPLES,
    SMALL,
    digest,
    drawn,
    noise,
    weights,
)
from tests.test_cli import command as command

DATA = np.load(pathlib.Path(__file__).parent / "data" / "openai.npz")
SHAPES = json.loads(str(DATA["shapes"]))
FAST = ("legacy heads", "head channels", "rescaled", "improved")  # the others compile for long
QUICK = ("ddim5", "chain of 5")


def some(names, fast):
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@functools.cache
def state_of(case):
    return weights(SHAPES[case], case)


@functools.cache
def model_of(case):
    stored = read_openai(state_of(case), {}, "mine.pt", CASES[case])
    schedule = stored.schedule.build()
    network = network_of(stored.config, Prediction(stored.prediction), schedule)
    return ddim.Model(network, jax.device_put(stored.params), schedule, stored.config, stored.facts)


def assert_close(got, want, rtol):
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("case", some(CASES, FAST))
def test_outputs_are_those_of_their_code(case):
    model, flags, want = model_of(case), CASES[case], DATA[case]
    x, t, y = drawn(case, flags["image_size"])
    labels = {"labels": y} if flags.get("class_cond") else {}
    if flags.get("learn_sigma"):
        both = jax.jit(lambda p, x: model.apply_fn.with_variance(p, x, t, **labels))
        eps, v = both(model.params, x)
        got = np.concatenate([eps, 2 * v - 1], axis=-1)
    else:
        got = jax.jit(lambda p, x: model.apply_fn(p, x, t, **labels))(model.params, x)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("name", some(SAMPLES, QUICK))
def test_samples_are_those_of_their_loops(name):
    """DDIM; and the chain of the learned variance, with its mean and variance halfway."""
    case, respacing, loop, clip = SAMPLES[name]
    model, size = model_of(case), CASES[case]["image_size"]
    tau = respaced(model.schedule.num_steps, respacing)
    np.testing.assert_array_equal(tau, DATA[f"{name} tau"])
    x_T, *z = noise(name, len(tau), size)
    labels = {"labels": drawn(case, size)[2]} if CASES[case].get("class_cond") else {}
    apply_fn = functools.partial(model.apply_fn, model.params, **labels)
    denoise = ddim.predicts(apply_fn, x0_fn=ddim.clip_x0(1.0) if clip else None)
    if loop == "ddim_sample_loop":
        got = jax.jit(lambda x: ddim.sample(denoise, x, model.schedule, tau))(x_T)
        assert_close(got, DATA[name], 1e-4)
        return
    plan = ddim.ddpm("learned")(model.schedule, tau)
    row = len(tau) - 1 - len(tau) // 2  # rows go down from τ_S
    c, learned = jax.tree.map(lambda v: np.float32(v[row]), (plan.steps, plan.learned))

    @jax.jit
    def run(x, z):
        chain = ddim.sample(denoise, x, model.schedule, tau, method=ddim.ddpm("learned"), noise=z)
        output, v = with_variance(denoise)(x, jnp.full(2, plan.t[row]))
        mean = towards(c, *denoise.prediction.x0_eps(c, x, output))
        return chain, mean, learned.log_variance(v)

    chain, mean, log_variance = run(x_T, jnp.stack(z))
    assert_close(chain, DATA[name], 1e-4)
    assert_close(mean, DATA[f"{name} mean"], 1e-5)
    assert_close(log_variance, DATA[f"{name} log_variance"], 1e-5)


@pytest.mark.parametrize("name", some(CLASSIFIERS, ("classifier attention",)))
def test_classifiers_and_their_gradients(name):
    _, flags = CLASSIFIERS[name]
    classifier = read_classifier(state_of(name), flags)
    x, t, y = drawn(name, 8, 10)

    @jax.jit
    def value_and_gradient(params, x):
        mine = classifier._replace(params=params)
        return mine(x, t), jax.grad(lambda x: mine.log_prob(y)(x, t).sum())(x)

    log_p, gradient = value_and_gradient(classifier.params, x)
    assert_close(log_p, DATA[name], 1e-5)
    assert_close(gradient, DATA[f"{name} gradient"], 2e-5)


@pytest.mark.slow
def test_ddim_guided_by_the_classifier_is_that_of_their_loop():
    case, name, respacing, scale = GUIDED
    model, tau = model_of(case), respaced(1000, respacing)
    classifier = read_classifier(state_of(name), CLASSIFIERS[name][1])
    log_prob = classifier.log_prob(drawn("guided", 8, 10)[2])
    guided = ddim.classifier(model.denoise, log_prob, model.schedule, scale)
    x_T = noise("guided", len(tau), 8)[0]
    got = jax.jit(lambda x: ddim.sample(guided, x, model.schedule, tau))(x_T)
    assert_close(got, DATA["guided"], 1e-4)
    assert not np.allclose(got, ddim.sample(model.denoise, jnp.asarray(x_T), model.schedule, tau))


def test_half_precision_weights_are_read():
    """As use_fp16 stores them: their convolutions in float16."""
    halved = {n: a.astype(np.float16) for n, a in state_of("legacy heads").items()}
    params = read_openai(halved, {}, "mine.pt", CASES["legacy heads"]).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    want = model_of("legacy heads").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), params, want)


def test_the_shapes_say_what_the_flags_do():
    for case, flags in CASES.items():
        said = shapes_say(state_of(case))
        levels = said.pop("attention_resolutions")
        told = check_flags(flags)
        assert {name: told[name] for name in said} == said
        assert levels == tuple(
            i
            for i in range(len(told["channel_mult"]))
            if told["image_size"] // 2**i in told["attention_resolutions"]
        )


# In millions, as the tables of the two papers say; those of improved-diffusion in its files' names.
SIZES = {
    **{"guided-imagenet64": 296, "guided-imagenet128": 422, "guided-imagenet256": 554},
    **{"guided-imagenet512": 559, "guided-lsun-bedroom": 552, "improved-imagenet64-cond": 270},
}


def their_shapes(abstract, rename):
    """The names and shapes of a network of ours in theirs."""
    shapes = {}
    for path, name, leaf in _named(abstract):
        theirs, shape = rename(name), leaf.shape
        if path[-1] == "kernel":
            shape = (*shape[-1:-3:-1], *shape[:-2])
            pool = path[-2] in ("q", "k", "v") or theirs.startswith("out.2.c_proj")
            shape += (1,) * (path[-2] == "proj_out" or pool)
            shape += (1, 1) * (path[-2] == "nin_shortcut")
        if path[-2:-1] == ("q",):
            joined = ".qkv_proj." if theirs.startswith("out.2") else ".qkv."
            theirs, shape = theirs.replace(".q.", joined), (3 * shape[0], *shape[1:])
        if path[-1] == "positions":
            shape = shape[::-1]
        if path[-2:-1] not in (("k",), ("v",)):
            shapes[theirs] = shape
    return shapes


@pytest.mark.parametrize("name", some(PUBLISHED, ("improved-cifar10",)))
def test_published_flags_make_the_networks_that_their_code_makes(name):
    """By the names and shapes of all tensors, at full size; and those of the papers in millions."""
    config = unet_of(check_flags(PUBLISHED[name].flags))
    shapes = their_shapes(abstract_params(config), lambda name: openai_name(name, config))
    got = digest(shapes)
    assert got == json.loads(str(DATA["whole"]))[name]
    if name in SIZES:
        assert abs(got[0] / 1e6 - SIZES[name]) < (4 if name.startswith("improved") else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_published_classifiers_are_those_that_their_code_makes(name):
    flags = PUBLISHED_CLASSIFIERS[name].flags
    same = {"image_size": flags["image_size"], "num_res_blocks": flags["classifier_depth"]}
    same |= {"resblock_updown": True, "num_head_channels": 64, "num_channels": 128}
    encoder = unet_of(check_flags({**same, "attention_resolutions": "32,16,8"}))
    config = ClassifierConfig(encoder, 1000)
    rename = functools.partial(classifier_name, config)
    got = digest(their_shapes(abstract_classifier(config), rename))
    assert got == json.loads(str(DATA["whole"]))[name]


def test_every_published_file_is_known_by_its_name():
    for model in (*PUBLISHED.values(), *PUBLISHED_CLASSIFIERS.values()):
        flags = check_flags(model.flags)
        assert flags["repository"] in ("", *("guided-diffusion", "improved-diffusion"))
    files = [model.file for model in (*PUBLISHED.values(), *PUBLISHED_CLASSIFIERS.values())]
    assert len(files) == len({*files}) == 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of theirs, and its flags in another."""
    folder = tmp_path_factory.mktemp("openai")
    for name, case in (("mine", "legacy heads"), ("classes", "head channels")):
        write_safetensors(folder / f"{name}.safetensors", state_of(case), {"format": "pt"})
    (folder / "classes.json").write_text(json.dumps(CASES["head channels"]))
    flags = {**CASES["legacy heads"], "timestep_respacing": "ddim5", "use_ddim": True, "lr": 1e-4}
    (folder / "flags.json").write_text(json.dumps(flags))
    classifier = "classifier attention"
    write_safetensors(folder / "classifier.safetensors", state_of(classifier), {"format": "pt"})
    (folder / "broken.json").write_text("{")
    (folder / "wide.json").write_text(json.dumps({**CASES["legacy heads"], "num_channels": 64}))
    (folder / "list.json").write_text("[1]")
    return folder


def test_load_save_and_load_again(folder):
    model = ddim.load_model(folder / "mine.safetensors", flags=folder / "flags.json")
    assert model.prediction.kind == "eps"
    x_T = jnp.asarray(noise("ddim5", 5, 8)[0])
    assert_close(model.sampler()(x_T), DATA["ddim5"], 1e-4)  # as use_ddim and ddim5 say
    with pytest.raises(ValueError, match="no whole stride makes 999"):
        model.sampler(999)
    again = folder / "again.safetensors"
    ddim.save_model(again, model, overwrite=True)
    loaded = ddim.load_model(again)
    assert loaded.config == model.config
    assert loaded.facts == model.facts
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert loaded.apply_fn.with_variance is not None
    line = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2"
    line += " --attention_resolutions 4 --num_heads 2 --learn_sigma True"
    same = ddim.load_model(folder / "mine.safetensors", flags=line)
    assert same.config == model.config
    chain = stored(same, 5)
    assert chain.tau.tolist() == DATA["chain of 5 tau"].tolist()
    assert chain.method(same.schedule, chain.tau).learned is not None
    assert len(stored(same).tau) == 1000
    with pytest.raises(ValueError, match="eta = 0.5 goes with use_ddim"):
        same.sampler(5, eta=0.5)


def test_the_command_takes_flags(folder, command):
    where, flags = str(folder / "mine.safetensors"), str(folder / "flags.json")
    shown = command(f"info {where} --flags {flags}")
    assert "timestep_respacing: ddim5" in shown
    with pytest.raises(SystemExit, match="num_channels is 64, the weights say 32"):
        command(f"info {where} --flags={folder / 'wide.json'}")
    where, flags, out = (str(folder / f"classes.{end}") for end in ("safetensors", "json", "png"))
    line = f"sample {where} --flags {flags} --steps 2 --num-images 2 --out {out} --labels 3,999"
    assert "2 images" in command(f"{line} --method ddpm-learned")
    for more, words in (("--label 1000", "0..999"), ("--labels 3,1 --guidance 2", "knows none")):
        with pytest.raises(SystemExit, match=words):
            command(f"{line.replace('--labels 3,999', more)} --overwrite")


BAD_FLAGS = {
    "an unknown one, nearly known": ({"num_chanels": 32}, "num_channels"),
    "one that nobody has": ({"colour": 1}, "colour is no flag"),
    "several, all named": ({"colour": 1, "dropout": 2}, "dropout must be in [0, 1)"),
    "no number": ({"num_channels": "wide"}, "num_channels must be a whole number"),
    "no truth": ({"learn_sigma": "maybe"}, "learn_sigma must be True or False"),
    "half a block": ({"num_res_blocks": 1.5}, "num_res_blocks must be a whole number"),
    "a schedule of others": ({"noise_schedule": "sqrt"}, "noise_schedule must be one of"),
    "groups": ({"num_channels": 48}, "multiples of 32"),
    "heads": ({"num_heads": 3}, "num_heads 3 does not divide 64"),
    "head channels": ({"num_head_channels": 24}, "num_head_channels 24 does not divide 64"),
    "an upsampler": ({"large_size": 256}, "upsampler"),
    "a size without multipliers": (
        {"channel_mult": "", "image_size": 24},
        "channel_mult is needed",
    ),
    "a size that is odd": ({"image_size": 9}, "cannot be halved"),
    "steps without their scale": ({"diffusion_steps": 4000}, "rescale_timesteps is needed"),
    "too few linear steps": ({"diffusion_steps": 20, "rescale_timesteps": False}, "above 20"),
    "no stride": ({"timestep_respacing": "ddim999"}, "no whole stride makes 999"),
    "no respacing": ({"timestep_respacing": "many"}, "timestep_respacing"),
    "sizes": ({"attention_resolutions": "16,-1"}, "attention_resolutions must be sizes"),
    "one of guided in improved": (
        {"repository": "improved-diffusion", "resblock_updown": True},
        "guided-diffusion alone",
    ),
    "a repository of others": ({"repository": "mine"}, "repository must be one of"),
    # and those that contradict the weights
    "blocks": ({"num_res_blocks": 2}, "num_res_blocks is 2, the weights say 1"),
    "width": ({"num_channels": 64}, "num_channels is 64, the weights say 32"),
    "levels": ({"channel_mult": "1,2,2"}, "channel_mult is 1,2,2, the weights say 1,2"),
    "variance": ({"learn_sigma": False}, "learn_sigma is False, the weights say True"),
    "classes": ({"class_cond": True}, "class_cond is True, the weights say False"),
    "norm": ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False"),
    "resampling": ({"resblock_updown": True}, "resblock_updown is True, the weights say False"),
    "attention": ({"attention_resolutions": "8"}, "attention_resolutions is 8, the weights say 4"),
}


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_bad_flags_are_named(what):
    flags, words = BAD_FLAGS[what]
    with pytest.raises(ValueError, match=re.escape(words)):
        read_openai(state_of("legacy heads"), {}, "mine.pt", {**CASES["legacy heads"], **flags})


@pytest.mark.parametrize("flag", DEFAULTS)
def test_no_value_of_a_flag_gets_further_than_the_check(flag):
    """Whatever is given is read, or refused by a ValueError at once."""
    values = [
        None,
        "",
        "x",
        -1,
        0,
        1,
        1e12,
        math.inf,
        math.nan,
        2**70,
        True,
        [],
        [2, "y"],
        {},
        b"1",
    ]
    for value in values:
        with contextlib.suppress(ValueError):
            flags = check_flags({**SMALL, flag: value})
            assert type(unet_of(flags).channels) is int
            schedule_of(flags).build()
    with pytest.raises(ValueError, match="7 is no flag"):
        check_flags({**SMALL, 7: 8})


def renamed(state, change):
    return {new: a for n, a in state.items() if (new := change(n)) is not None}


BAD_STATES = {
    "no way up": (lambda n: None if n.startswith("output") else n, "load_classifier"),
    "a tensor less": (lambda n: None if n == "time_embed.2.bias" else n, "time_embed.2.bias"),
    "no end": (lambda n: None if n.startswith("out.2") else n, "out.2.weight"),
    "a tensor more": (lambda n: "extra.weight" if n == "out.0.bias" else n, "extra.weight"),
}


@pytest.mark.parametrize("what", BAD_STATES)
def test_bad_weights_are_named(what):
    change, words = BAD_STATES[what]
    state = renamed(state_of("legacy heads"), change)
    with pytest.raises(ValueError, match=words):
        read_openai(state, {}, "mine.pt", CASES["legacy heads"])


@pytest.mark.parametrize("bad", [(), (0,), (7,), (3, 0), (9, 1, 1), (2, 2, 2, 2, 2)])
def test_no_shape_gets_further_than_the_check(bad):
    """Every fifth tensor in turn has another shape."""
    kinds = {"legacy heads": CASES["legacy heads"]}
    kinds |= {"classifier attention": CLASSIFIERS["classifier attention"][1]}
    for case, flags in kinds.items():
        state = state_of(case)
        for name in [*sorted(state)[::5], "time_embed.0.weight"]:
            broken = {**state, name: np.ones(bad, np.float32)}
            if case == "legacy heads":
                with pytest.raises(ValueError, match="shape|missing"):
                    read_openai(broken, {}, "mine.pt", flags)
            else:
                with pytest.raises((ValueError, LookupError, ZeroDivisionError)):
                    read_classifier(broken, flags)


def test_an_upsampler_and_broken_numbers_are_refused():
    state = dict(state_of("legacy heads"))
    first = state["input_blocks.0.0.weight"]
    six = state | {"input_blocks.0.0.weight": np.concatenate([first, first], axis=1)}
    with pytest.raises(ValueError, match="upsampler"):
        read_openai(six, {}, "mine.pt", CASES["legacy heads"])
    broken = state | {"out.2.bias": np.full(6, np.nan, np.float32)}
    with pytest.raises(ValueError, match="not finite numbers: out.2.bias"):
        read_openai(broken, {}, "mine.pt", CASES["legacy heads"])


def test_files_without_flags_say_what_they_know(folder):
    mine = folder / "mine.safetensors"
    with pytest.raises(ValueError, match=r"num_channels 32, num_res_blocks 1, channel_mult 1,2"):
        ddim.load_model(mine)
    for flags, words in {
        "guided-imagenet64": "contradict the shapes",
        "--image_size": "pairs",
        str(folder / "broken.json"): "not JSON",
        str(folder / "list.json"): "a list, where a dict of flags belongs",
    }.items():
        with pytest.raises(ValueError, match=words):
            ddim.load_model(mine, flags=flags)
    named = folder / "64x64_diffusion.pt"
    with pytest.raises(ValueError, match="flags of the published 64x64_diffusion.pt contradict"):
        read_openai(state_of("legacy heads"), {}, str(named), None)
    with pytest.raises(FileNotFoundError, match="guided-imagenet512"):
        ddim.load_model(mine, flags="guided-imagenet1024")
    with pytest.raises(ValueError, match="flags is for a PyTorch checkpoint"):
        ddim.load_model("digits", flags=SMALL)
    with pytest.raises(ValueError, match="no config and no image_size too"):
        ddim.load_model(mine, flags=SMALL, image_size=8)
    with pytest.raises(ValueError, match="load_classifier"):
        ddim.load_model(folder / "classifier.safetensors", flags=SMALL)


BAD_CLASSIFIERS = {
    "depth": ({"classifier_depth": 2}, "classifier_depth 2"),
    "width": ({"classifier_width": 64}, "classifier_width is 64, the weights say 32"),
    "pool": ({"classifier_pool": "spatial"}, "classifier_pool is spatial, the weights say att"),
    "size": ({"image_size": 16, "classifier_attention_resolutions": "8"}, "weights say 8"),
    "unknown": ({"classifier_colour": 1}, "classifier_colour is no flag"),
    "no pool": ({"classifier_pool": "max"}, "classifier_pool must be one of"),
    "blocks": ({"classifier_resblock_updown": False}, "classifier_resblock_updown is False"),
}


@pytest.mark.parametrize("what", BAD_CLASSIFIERS)
def test_bad_classifiers_are_named(folder, what):
    flags, words = BAD_CLASSIFIERS[what]
    own = CLASSIFIERS["classifier attention"][1]
    with pytest.raises(ValueError, match=words):
        load_classifier(folder / "classifier.safetensors", flags={**own, **flags})


def test_a_diffusion_model_is_no_classifier_and_labels_are_checked(folder):
    with pytest.raises(ValueError, match="load_model"):
        load_classifier(folder / "mine.safetensors", flags={"image_size": 8})
    with pytest.raises(ValueError, match="no published classifier"):
        load_classifier(folder / "classifier.safetensors")
    with pytest.raises(ValueError, match="classifier_depth must be a whole number, got 'deep'"):
        load_classifier(folder / "classifier.safetensors", flags={"classifier_depth": "deep"})
    with pytest.raises(ValueError, match="classifier_depth 4 does not go with"):
        load_classifier(folder / "classifier.safetensors", flags="guided-classifier64")
    flags = CLASSIFIERS["classifier attention"][1]
    classifier = load_classifier(folder / "classifier.safetensors", flags=flags)
    for labels, words in (([10], r"0\.\.9"), ([[1]], "integers"), ([0.5], "integers")):
        with pytest.raises(ValueError, match=words):
            classifier.log_prob(np.array(labels))
    with pytest.raises(ValueError, match="labels of 1 images and 2"):
        classifier.log_prob(np.array([1]))(jnp.ones((2, 8, 8, 3)), jnp.array([1, 1]))


def test_a_command_line_with_equals_signs():
    said = read_flags("--image_size=64 --attention_resolutions 16,8 --learn_sigma=True")
    assert said == {"image_size": "64", "attention_resolutions": "16,8", "learn_sigma": "True"}
