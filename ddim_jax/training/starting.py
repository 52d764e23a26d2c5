"""Where training starts from: the weights, network and schedule of a trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ddim_jax.networks.config import UNetConfig
from ddim_jax.process.schedule import Schedule
from ddim_jax.storage.checkpoint import restore_config
from ddim_jax.storage.checkpoint_folder import CheckpointError, saved_steps
from ddim_jax.storage.files import portable
from ddim_jax.training.presets import Preset
from ddim_jax.training.step import ApplyFn, Params
from ddim_jax.weights import Model, from_facts, to_facts

# A network that differs in these has the same weights, but for its table of classes.
FREE = ("num_classes", "dropout", "dtype", "remat")


class Start(NamedTuple):
    """What `fit` takes, from a trained model."""

    apply_fn: ApplyFn
    params: Params
    schedule: Schedule
    facts: dict[str, Any]  # for fit(..., facts=): network, schedule, prediction, "init"


def start_from(
    model: Model, config: UNetConfig | None = None, source: str | os.PathLike[str] = ""
) -> Start:
    """Fine-tuning: all that `fit` needs to go on from a trained model's weights.

    Parameters and moving average both start at `model.params`; the optimiser starts anew. The
    SHA-256 of the weights is stored in the run, which cannot be resumed from others.

    A table of classes that the model has not starts at 0, so that the network is at first the
    model for every class; one of another number of classes at the model's row for "no label", and
    `config.num_classes=None` adds that row to a bias: the model for images without labels.

    Args:
      model: of `load_model`, or one with a `UNetConfig` and the facts of `to_facts`.
      config: the network to train, by default `model.config`; it may differ in num_classes,
        dropout, dtype and remat.
      source: the model's name, kept beside the digest.

    Returns:
      A `Start`.

    Raises:
      ValueError: the model does not say its network or schedule, config is of another network, or
        the weights are not finite.

    Example:
      >>> import ddim_jax as ddim
      >>> model = ddim.load_model("digits")
      >>> start = start_from(model, dataclasses.replace(model.config, num_classes=10), "digits")
      >>> start.params["label_embedding"].shape, start.facts["prediction"]
      ((11, 128), 'v')
    """
    schedule, own = from_facts(model.facts)
    config = config or own
    for field in dataclasses.fields(UNetConfig):
        wanted, has = getattr(config, field.name), getattr(own, field.name)
        if field.name not in FREE and wanted != has:
            raise ValueError(
                f"the model's network has {field.name}={has!r}, wanted is {wanted!r}: only "
                f"{', '.join(FREE)} may be changed"
            )
    if not own.null_label and config.num_classes != own.num_classes:
        raise ValueError(
            "the model's classes have no row for none of them, of which others could begin: keep "
            f"num_classes={own.num_classes}, got {config.num_classes}"
        )
    params = jax.tree.map(np.asarray, model.params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise ValueError("the model's weights are not finite: training cannot start from them")
    init = {"source": portable(f"{source}"), "sha256": sha256(params)}
    from ddim_jax.networks.unet import make_apply  # flax: only where a network is made

    return Start(
        make_apply(config),
        jax.device_put(with_classes(params, own.num_classes, config.num_classes)),
        schedule.build(),
        {**to_facts(schedule, config, model.prediction), "init": init},
    )


def with_classes(params: Params, has: int | None, wanted: int | None) -> Params:
    """The weights of a U-Net of `has` classes as those of one of `wanted` classes.

    Args:
      params: of the network, NumPy arrays.
      has: its number of classes K, None without.
      wanted: that of the new network.

    Returns:
      New weights: unchanged where the number is; see `start_from` for the others.

    Example:
      >>> with_classes({"w": np.ones(1, np.float32)}, 3, 3)
      {'w': array([1.], dtype=float32)}
    """
    if has == wanted:
        return params
    params = dict(params)
    dense = params["temb"]["dense"]
    bias = dense["1"]["bias"]
    none = params.pop("label_embedding")[-1] if has is not None else np.zeros_like(bias)
    if wanted is not None:
        return {**params, "label_embedding": np.tile(none, (wanted + 1, 1))}
    last = {**dense["1"], "bias": bias + none}
    return {**params, "temb": {**params["temb"], "dense": {**dense, "1": last}}}


def sha256(params: Params) -> str:
    """Of all names, types, shapes and values of a pytree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.data)
    return digest.hexdigest()


def follow(
    preset: Preset,
    given: Collection[str],
    facts: Mapping[str, Any],
    name: str,
) -> Preset:
    """A preset with the network, schedule and prediction of a model or run.

    Args:
      preset: what was asked for.
      given: the fields that were asked for by name, "model.channels"; others are the preset's own.
      facts: of the model, or of a run's checkpoint.
      name: what it is called in an error.

    Returns:
      The preset; of the network `FREE` fields stay as given.

    Raises:
      ValueError: a field that was given contradicts the model.

    Example:
      >>> from ddim_jax.training.presets import cifar10, digits
      >>> facts = to_facts(digits().schedule, digits().model, "v")
      >>> follow(cifar10(), {"model.dropout"}, facts, "digits").model.channels
      32
      >>> follow(cifar10(), {"model.channels"}, facts, "digits")
      Traceback (most recent call last):
      ValueError: digits is a network with model.channels = 32, asked for is 128: leave it out
    """
    schedule, network = from_facts(facts)
    learned = {"prediction": facts.get("prediction", "eps")}
    learned |= {"sigma_data": facts["sigma_data"]} if "sigma_data" in facts else {}

    def joined(part: str, own: Any, asked: Any, free: Collection[str] = ()) -> Any:
        names = [f.name for f in dataclasses.fields(own) if f"{part}.{f.name}" in given]
        for field in names:
            has, wanted = getattr(own, field), getattr(asked, field)
            if field not in free and has != wanted:
                raise ValueError(
                    f"{name} is a network with {part}.{field} = {has!r}, asked for is {wanted!r}: "
                    "leave it out"
                )
        return dataclasses.replace(own, **{n: getattr(asked, n) for n in names})

    train = joined("train", dataclasses.replace(preset.train, **learned), preset.train)
    return dataclasses.replace(
        preset,
        model=joined("model", network, preset.model, FREE),
        schedule=joined("schedule", schedule, preset.schedule),
        train=train,
    )


def check_same_start(saved: Mapping[str, Any], facts: Mapping[str, Any], run: str) -> None:
    """Raises ValueError where a run that is resumed was begun from other weights.

    Args:
      saved: the configuration of the run, {} where there is none.
      facts: of the `Start`.
      run: its name.

    Example:
      >>> check_same_start({"train": {}}, {"init": {"source": "a", "sha256": "00"}}, "runs/b")
      Traceback (most recent call last):
      ValueError: runs/b was begun from no model, not from a: go on without --init
    """
    began, asked = saved.get("init"), facts["init"]
    if not saved or (began and began["sha256"] == asked["sha256"]):
        return
    name = f"{began['source']} ({began['sha256'][:12]}…)" if began else "no model"
    also = f" ({asked['sha256'][:12]}…)" if began else ""
    raise ValueError(
        f"{run} was begun from {name}, not from {asked['source']}{also}: go on without --init"
    )


def facts_of_run(directory: pathlib.Path) -> dict[str, Any]:
    """The configuration of the newest readable checkpoint of a run; {} where there is none."""
    for step in reversed(saved_steps(directory / "checkpoints")):
        try:
            return restore_config(directory / "checkpoints", step)
        except CheckpointError:
            continue
    return {}
