"""Whether a run may begin or go on, and where it goes on from."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ddim_jax.data import Dataset, changes, check_main_guard
from ddim_jax.process.prediction import Prediction
from ddim_jax.process.schedule import Schedule
from ddim_jax.storage.checkpoint import Restored, restore
from ddim_jax.storage.checkpoint_folder import CheckpointError, DamagedError, saved_steps, set_aside
from ddim_jax.storage.files import differences, flat
from ddim_jax.training import parallel
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.run_folder import LOG
from ddim_jax.training.step import Params, TrainState, init_state
from ddim_jax.weights import from_facts

# These may change when a run is resumed; anything else would make it another run. Those of the
# second kind leave every function as it is, but not the order of sums, nor of dropout's draws.
FREE_ON_RESUME = (
    "train.num_updates",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep",
    "train.num_threads",
    "train.num_workers",
    "train.data_on_device",
    "train.steps_per_call",
    "train.skip_nonfinite",
    "label_names",
)
INHERITED = {"init"}  # said once, when the run began: a resumed one need not say it again
ROUNDS_ON_RESUME = ("train.accumulate", "train.fsdp", "model.remat")
ROUNDED = (
    "from here on the run agrees with the unbroken one up to rounding (and, with another "
    "accumulate, but for the masks of dropout), as these differ:"
)


def check_run(
    dataset: Dataset,
    config: TrainConfig,
    directory: str | PathLike[str],
    facts: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    resume: Literal["never", "auto", "must"] = "never",
) -> tuple[Mesh, dict[str, Any]]:
    """All that `fit` can know before it writes anything: whether this run may begin, or go on.

    Args:
      dataset, config, directory, facts, num_classes, resume: as in `fit`.

    Returns:
      The mesh, and the configuration that the checkpoints are to hold.

    Raises:
      FileExistsError, CheckpointError, ValueError: as `fit`.
    """
    directory = pathlib.Path(directory)
    folder = directory / "checkpoints"
    if resume not in ("never", "auto", "must"):
        raise ValueError(f"resume must be 'never', 'auto' or 'must', got {resume!r}")
    if config.num_workers:
        check_main_guard()
    if num_classes not in (None, dataset.num_classes):
        has = dataset.num_classes
        advice = f"set num_classes={has} (--model.num-classes {has})"
        if has is None:
            advice = "say where they are, labels (--data.labels), if there are any"
        raise ValueError(
            f"the network is for {num_classes} classes, {dataset.name} has {has or 'no labels'}: "
            f"{advice}, or num_classes=None (--model.num-classes None) to learn without classes"
        )
    mesh = parallel.make_mesh(config.fsdp)
    if config.batch_size % (mesh.size * config.accumulate):
        raise ValueError(
            f"batch_size = {config.batch_size} in accumulate = {config.accumulate} parts cannot be "
            f"split over {mesh.size} devices: make it a multiple of "
            f"{mesh.size * config.accumulate}"
        )
    if config.post_hoc and jax.process_count() > 1:
        raise ValueError("post_hoc is for one process: leave it out with several")
    log_path = directory / LOG
    logged_before = log_path.exists() and log_path.stat().st_size
    if resume == "never" and (saved_steps(folder) or logged_before):
        raise FileExistsError(
            f"{directory} already holds a run; resume it, or choose another folder"
        )
    if resume == "must" and not saved_steps(folder):
        raise CheckpointError(
            f"{directory} holds no checkpoint to resume from; resume 'auto' begins where there is "
            "none"
        )
    learned = Prediction(config.prediction, sigma_data=config.sigma_data).facts()
    facts = {**learned, **(facts or {})}
    if said := {name: facts[name] for name in learned if facts[name] != learned[name]}:
        raise ValueError(
            f"facts say of the network {said}, config that it learns {learned}: leave it out of "
            "facts"
        )
    if num_classes is not None and dataset.label_names is not None:
        facts = {"label_names": dataset.label_names, **facts}
    config_dict = {"train": dataclasses.asdict(config), "data": dataset.provenance, **facts}
    return mesh, json.loads(json.dumps(config_dict))  # as a checkpoint returns it


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Raises ValueError, showing each difference, where two configurations make two runs.

    Returns:
      A line for each difference that changes rounding alone.

    Example:
      >>> check_same_run({"train": {"seed": 0, "keep": 3}}, {"train": {"seed": 0, "keep": 5}})
      []
      >>> check_same_run({"train": {"accumulate": 1}}, {"train": {"accumulate": 4}})
      ['  train.accumulate: saved 1, now 4']
      >>> check_same_run({"train": {"seed": 0}}, {"train": {"seed": 1}})
      Traceback (most recent call last):
      ValueError: a resumed run must keep its configuration, but these differ:
        train.seed: saved 0, now 1
    """
    if "model" in saved and "norm_groups" in wanted.get("model", {}):  # once it was always 32
        saved = {**saved, "model": {"norm_groups": 32, **saved["model"]}}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    new = {name: defaults[name] for name in wanted["train"].keys() & defaults.keys()}
    saved = {**saved, "train": {**new, **saved["train"]}}  # of before there was such a field
    saved = {name: value for name, value in saved.items() if name not in INHERITED - wanted.keys()}
    free = {*FREE_ON_RESUME, *ROUNDS_ON_RESUME, "init.source"}
    if decays := wanted["train"].get("cosine_decay"):
        free.remove("train.num_updates")
    before, data = saved.get("data", {}), wanted.get("data", {})
    if data.get("digest", "") == before.get("digest"):  # the same content, wherever it lies
        free.add("data.name")

    def among(names: Callable[[str], bool]) -> list[str]:
        both = ({k: v for k, v in flat(config).items() if names(k)} for config in (saved, wanted))
        return differences(*both)

    if differ := among(lambda name: name not in free):
        if decays and any(line.startswith("  train.num_updates:") for line in differ):
            differ.append(
                "  the rate decays over train.num_updates: to train longer, begin a run "
                "with --init (start_from)"
            )
        differ += changes(before, data)
        raise ValueError(
            "\n".join(["a resumed run must keep its configuration, but these differ:", *differ])
        )
    return among(lambda name: name in ROUNDS_ON_RESUME)


def check_facts(
    config: dict[str, Any],
    params: Params,
    schedule: Schedule,
    dataset: Dataset,
    num_classes: int | None,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Says at the start of a run what `load_model` would say of it in the end."""
    from ddim_jax.networks.inputs import check_params
    from ddim_jax.networks.unet import abstract_params

    try:
        schedule_config, model = from_facts(config)
        built = schedule_config.build()
    except ValueError as error:
        if jax.process_index() == 0:
            say(
                f"warning: load_model and `ddim-jax sample` will not read this run ({error}). For "
                "a U-Net of ours give fit(..., facts=to_facts(schedule_config, unet_config)), of "
                "ddim_jax.weights; of a network of your own read the moving average with "
                f"ddim_jax.storage.checkpoint.restore_part({str(folder)!r})"
            )
        return
    check_params(params, abstract_params(model))
    told, used = (np.asarray(s.log_alpha_bar) for s in (built, schedule))
    if told.shape != used.shape or not np.allclose(told, used, rtol=1e-5):
        raise ValueError(
            f"the schedule of facts, {schedule_config}, is not the one to train with: build it by "
            "schedule_config.build()"
        )
    if model.num_classes != num_classes:
        raise ValueError(
            f"the network of facts is for {model.num_classes} classes, fit was called with "
            f"num_classes={num_classes}: without labels it learns none, so give both the same"
        )
    if num_classes is not None and not model.null_label and config["train"]["label_dropout"]:
        raise ValueError(
            "label_dropout hides labels behind 'no label', for which this network has no row "
            "(null_label=False): set label_dropout=0 (--train.label-dropout 0)"
        )
    if model.image_shape != dataset.image_shape:
        raise ValueError(
            f"the network of facts has images {model.image_shape}, {dataset.name} has "
            f"{dataset.image_shape}: set image_size={dataset.image_shape[:2]} and in_channels="
            f"{dataset.image_shape[2]} in its UNetConfig"
        )


def take_up(
    folder: pathlib.Path,
    params: Params,
    config: TrainConfig,
    mesh: Mesh,
    fallback: bool,
    say: Callable[[str], None],
    facts: dict[str, Any],
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state of the latest checkpoint, or the first one; its step; what waits for the log.

    `facts`, which the checkpoints to come hold, get what is said only once, when a run begins.
    """
    params = jax.tree.map(np.asarray, params)
    like = jax.eval_shape(lambda p: init_state(p, config), params)
    sharding = parallel.state_sharding(mesh, like)
    if not saved_steps(folder):
        state = jax.jit(lambda p: init_state(p, config), out_shardings=sharding)(params)
        return state, 0, {"waiting": {}, "skipped_in_a_row": 0}
    like = jax.tree.map(_placed, like, sharding)
    restored = restore_latest(folder, like, fallback, say, facts)
    facts |= {name: restored.config[name] for name in INHERITED & restored.config.keys()}
    if restored.step > config.num_updates:
        raise ValueError(
            f"{folder.parent} is at step {restored.step}, past num_updates = {config.num_updates}"
        )
    waiting = {name: restored.data_state[name] for name in ("waiting", "skipped_in_a_row")}
    return restored.state, restored.step, waiting


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore_latest(
    folder: pathlib.Path,
    like: TrainState,
    fallback: bool,
    say: Callable[[str], None],
    config: Mapping[str, Any],
) -> Restored:
    """The latest checkpoint; with `fallback` the newest intact one, damaged ones moved aside."""
    damaged: list[int] = []
    for step in reversed(saved_steps(folder)):
        try:
            restored = restore(folder, like, step)
        except DamagedError as error:
            if not fallback:
                raise DamagedError(
                    f"{error}. --fallback (fallback=True) goes on from the newest intact one, and "
                    "moves the damaged aside"
                ) from error
            say(f"warning: {error}")
            damaged.append(step)
            continue
        if rounded := check_same_run(restored.config, config):
            say("\n".join([ROUNDED, *rounded]))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints were read")
        for bad in damaged if jax.process_index() == 0 else ():
            say(f"warning: moved the damaged checkpoint {bad} to {set_aside(folder, bad)}")
        if damaged:
            say(f"going on from step {step}, the newest intact checkpoint")
        return restored
    raise DamagedError(f"no checkpoint in {folder} is intact: {', '.join(map(str, damaged))}")
