"""The smallest network, data and configuration that train; and a small U-Net's configuration."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import Dataset
from ddim_jax.generation.drawing import make_draw
from ddim_jax.networks.unet import UNetConfig, build
from ddim_jax.process.schedule import schedule_from_betas
from ddim_jax.sampling.plan import with_memory
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import make_train_step
from ddim_jax.weights import to_facts

SCHEDULE = schedule_from_betas(np.linspace(0.01, 0.3, 10))
UNET = UNetConfig(
    image_size=8,
    channels=32,
    multipliers=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    dropout=0.0,
)


def affine(params, x, t, dropout_key=None, labels=None):
    """The smallest network with weights; ten per cent dropout when it gets a key."""
    out = params["w"] * x + params["b"]
    if dropout_key is not None:
        out = out * jax.random.bernoulli(dropout_key, 0.9, x.shape).astype(x.dtype)
    return out


def affine_params():
    return {"w": jnp.float32(0.5), "b": jnp.float32(-0.25)}


def make_config(**changes):
    small = {"batch_size": 8, "num_updates": 12, "log_every": 2, "checkpoint_every": 4}
    return TrainConfig(**{**small, "warmup_steps": 5, "learning_rate": 0.01, **changes})


def unet_model(prediction="eps", image_size=8, in_channels=1, channels=32, num_classes=None):
    """A U-Net of random weights."""
    config = UNetConfig(
        *(image_size, in_channels, channels, (1,)),
        num_blocks=1,
        attention_resolutions=(),
        dropout=0.0,
        num_classes=num_classes,
    )
    apply_fn, params = build(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + rng.normal(0, 0.02, p.shape).astype(np.float32), params)
    schedule = ddim.ScheduleConfig("cosine")
    facts = to_facts(schedule, config, prediction)
    return ddim.Model(ddim.predicts(apply_fn, prediction), params, schedule.build(), config, facts)


def make_batch(size, seed=0, shape=(4, 4, 1)):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, *shape), np.uint8)
    return {"image": images, "label": rng.integers(0, 10, size, np.int32)}


@functools.cache
def shuffle_once():
    """Grain finds an index of a small data set among 65,536, in 0.7 ms; here, the first time."""
    with contextlib.suppress(ImportError, AttributeError):  # grain promises neither
        from grain._src.python.dataset.transformations import shuffle

        found = functools.cache(shuffle.index_shuffle.index_shuffle)
        shuffle.index_shuffle = types.SimpleNamespace(index_shuffle=found)


def make_dataset(size=40):
    shuffle_once()
    arrays = make_batch(size)

    def read(indices):
        return arrays["image"][indices], arrays["label"][indices]

    return Dataset("noise", "train", size, (4, 4, 1), 10, {"name": "noise"}, read)


def assert_same(a, b):
    """Two trees of arrays: one structure, the same shapes, types and values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


def padded(plan):
    """The plan in the program of the longest memory, where it has one."""
    return plan if plan.weights is None else with_memory(plan, 4)


DRAWS, STEPS = {}, {}


def shared_draw(model, mesh, tau, method, *, clip=False, keep=None):
    """`make_draw`, traced once for all that differ in no more than weights, seed and numbers."""
    plan, kept = method(model.schedule, tau), None if keep is None else keep.tobytes()
    tables = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((plan, model.schedule))]
    key = (model.apply_fn, model.config, mesh, jax.tree.structure(plan), *tables, clip, kept)
    if key not in DRAWS:
        DRAWS[key] = make_draw(model, mesh, tau, method, clip=clip, keep=keep)
    return DRAWS[key]


def shared_train_step(apply_fn, schedule, config, num_classes=None, mesh=None):
    """`make_train_step`, traced once for all runs that differ only in what the step never sees."""
    unseen = {"log_every": 1, "checkpoint_every": 1, "sample_every": 0, "keep": 1}
    unseen |= {"num_threads": 1, "num_workers": 0, "data_on_device": None, "steps_per_call": None}
    unseen |= {"batch_size": config.accumulate, "fsdp": 1, "post_hoc": False}
    unseen |= {} if config.cosine_decay else {"num_updates": 1}
    same = dataclasses.replace(config, **unseen)
    key = (apply_fn, np.asarray(schedule.log_alpha_bar).tobytes(), same, num_classes, mesh)
    if key not in STEPS:
        STEPS[key] = make_train_step(apply_fn, schedule, same, num_classes, mesh)
    return STEPS[key]
