"""The training loop: data in, steps, metrics, pictures, checkpoints; stopped and taken up at will.

A checkpoint holds everything that the next step depends on, the metrics not yet logged included;
so a resumed run is the unbroken run, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from ddim_jax.data import Dataset, batch_indices, batches, check_main_guard
from ddim_jax.networks.flops import flops_per_image
from ddim_jax.pictures.images import grid
from ddim_jax.process.prediction import predicts
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import timesteps
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.storage.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    Restored,
    restore,
    saved_steps,
    set_aside,
)
from ddim_jax.storage.files import differences, flat
from ddim_jax.training import parallel
from ddim_jax.training.run_folder import LOG, MetricsLog, Preempted, StopSignals, locked
from ddim_jax.training.step import (
    ApplyFn,
    Metrics,
    Params,
    TrainConfig,
    TrainState,
    init_state,
    make_train_step,
)
from ddim_jax.weights import Model, from_facts

IN_FLIGHT = 2  # steps handed to the device before the host waits for one
MAX_SKIPPED = 100  # updates in a row, after which a run that skips them stops nevertheless
PREVIEW_IMAGES, PREVIEW_STEPS = 36, 20

# These may change when a run is resumed; anything else would make it another run. Those of the
# second kind leave every function as it is, but not the order of sums, nor of dropout's draws.
FREE_ON_RESUME = (
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep",
    "train.num_threads",
    "train.num_workers",
    "train.skip_nonfinite",
)
ROUNDS_ON_RESUME = ("train.accumulate", "train.fsdp", "model.remat")
ROUNDED = (
    "from here on the run agrees with the unbroken one up to rounding (and, with another "
    "accumulate, but for the masks of dropout), as these differ:"
)


def fit(
    apply_fn: ApplyFn,
    params: Params,
    schedule: Schedule,
    dataset: Dataset,
    config: TrainConfig,
    directory: str | PathLike[str],
    *,
    facts: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    resume: Literal["never", "auto", "must"] = "never",
    fallback: bool = False,
    progress: bool = True,
    on_log: Callable[[TrainState, dict[str, float]], None] | None = None,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Trains, or continues training, in a run folder, on all devices of all processes.

    The folder gets `checkpoints/`, `metrics.jsonl`, `samples/` and TensorBoard's event file. A line
    of metrics every `log_every` steps holds the step, means of loss, gradient and parameter norm
    since the last line, images per second, FLOP/s of the network's forward and backward pass, their
    share of the devices' peak where that is known ("mfu"), and seconds since the start.

    The host never waits for a step, but `IN_FLIGHT` steps later: data, steps and checkpoints go on
    at the same time. Losses and gradients are looked at when they are logged, always before a
    checkpoint: a run that diverges stops at the next line, names the first bad step and its images,
    and leaves only good checkpoints.

    SIGTERM or SIGINT (Ctrl-C) saves a checkpoint and raises `Preempted`; a second one ends the
    process at once. The folder is locked against a second writer.

    Args:
      apply_fn: see `make_train_step`.
      params: initial parameters; on resume only their shapes matter.
      schedule: of the forward process.
      dataset: images to train on.
      config: how to train.
      directory: the run folder, made if missing.
      facts: JSON-able, kept in every checkpoint's config beside "train" (the TrainConfig) and
        "data" (the data set's provenance): what a reader needs to rebuild apply_fn. Of our U-Net
        `ddim_jax.weights.to_facts(schedule_config, unet_config)`, without which `load_model`
        does not read the run; a warning says so at the start.
      num_classes: see `make_train_step`.
      resume: "never": the folder must not hold a run. "must": continue from its latest checkpoint.
        "auto": continue where there is a checkpoint, begin where there is none.
      fallback: where the latest checkpoint is damaged, say so, move it to `damaged/` and continue
        from the newest intact one.
      progress: show a progress bar on stderr.
      on_log: called with the state and each line of metrics; the state dies with the next step,
        so copy what you keep.
      say: told what the user should know.

    Returns:
      The state after `config.num_steps` steps.

    Raises:
      FileExistsError: the folder holds a run and `resume` is "never".
      BlockingIOError: another process trains in the folder.
      CheckpointError: nothing to resume, no readable checkpoint that fits `params`, or a checkpoint
        could not be written.
      ValueError: the saved configuration differs, and the message shows where; the batch cannot be
        split over the devices; or `facts` tell of another schedule, or of a U-Net with other
        parameters, classes or images.
      RuntimeError: worker processes, and a main script without `if __name__ == "__main__":`.
      FloatingPointError: a loss or gradient is not finite.
      Preempted: a signal asked to stop, and the state is saved.
    """
    directory = pathlib.Path(directory)
    folder = directory / "checkpoints"
    apply_fn = predicts(apply_fn, config.prediction)
    mesh, config_dict = check_run(dataset, config, directory, facts, num_classes, resume)
    _check_facts(config_dict, params, schedule, dataset, num_classes, folder, say)
    params = jax.tree.map(np.asarray, params)
    like = jax.eval_shape(lambda p: init_state(p, config), params)
    sharding = parallel.state_sharding(mesh, like)
    with locked(directory), StopSignals() as signals:
        step, waiting, in_a_row = 0, {}, 0  # metrics not yet logged, updates skipped
        if saved_steps(folder):
            like = jax.tree.map(_placed, like, sharding)
            restored = _restore(folder, like, fallback, say, config_dict)
            state, step = restored.state, restored.step
            waiting, in_a_row = (restored.data_state[k] for k in ("waiting", "skipped_in_a_row"))
            if step > config.num_steps:
                raise ValueError(
                    f"{directory} is at step {step}, past num_steps = {config.num_steps}"
                )
        else:
            state = jax.jit(lambda p: init_state(p, config), out_shardings=sharding)(params)
        start = step
        iterator = batches(
            dataset,
            config.batch_size,
            config.seed,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.num_threads,
            num_workers=config.num_workers,
        )
        train_step: Any = make_train_step(apply_fn, schedule, config, num_classes, mesh)
        shape = (config.batch_size, *dataset.image_shape)
        flops = 3 * flops_per_image(apply_fn, like.params, shape, num_classes)
        peak = parallel.peak_flops(jax.devices()[0].device_kind)
        preview = _make_preview(
            apply_fn, schedule, dataset.image_shape, num_classes, mesh, config.seed, say
        )
        pending: list[Metrics] = []  # on the devices
        began = logged = time.perf_counter()
        since, stop = start, False  # the step of the last line of this process
        shown = progress and jax.process_index() == 0
        with (
            Checkpoints(folder, config.keep) as checkpoints,
            MetricsLog(directory, start) as log,
            tqdm(total=config.num_steps, initial=start, unit="step", disable=not shown) as bar,
        ):
            while step < config.num_steps:
                batch = parallel.put_batch(mesh, next(iterator))
                if step == start:
                    train_step = train_step.lower(state, batch).compile()
                    began = logged = time.perf_counter()
                state, metrics = train_step(state, batch)
                step += 1
                pending.append(metrics)
                if len(pending) > IN_FLIGHT:
                    pending[-1 - IN_FLIGHT]["loss"].block_until_ready()
                bar.update()
                last = step == config.num_steps
                stop = signals.requested(step) and not last
                to_save = step % config.checkpoint_every == 0 or last or stop
                to_log = step % config.log_every == 0 or last
                if to_save or to_log:
                    in_a_row = _collect(waiting, pending, step, in_a_row, dataset, config)
                    pending = []
                if to_log and waiting["loss"]:
                    line = {"step": step, **_means(waiting, config)}
                    now = time.perf_counter()
                    speed = (step - since) * config.batch_size / (now - logged)
                    line["images_per_second"] = speed
                    if flops > 0:
                        line["flops_per_second"] = speed * flops
                    if flops > 0 and peak:
                        line["mfu"] = speed * flops / (peak * mesh.size)
                    line["seconds"] = now - began
                    log.line(line)
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, {speed:.3g} images/s")
                    if on_log:
                        on_log(state, line)
                    waiting, logged, since = {}, now, step
                drawn = config.sample_every and (step % config.sample_every == 0 or last)
                if drawn and not stop:
                    preview(state.ema, step, log)
                if to_save:
                    position = {"batch": step, "waiting": waiting, "skipped_in_a_row": in_a_row}
                    checkpoints.save(step, state, position, config_dict)
                if stop:
                    break
        if waiting.get("skipped") and not stop:
            say(f"the last {len(waiting['skipped'])} updates were skipped, and are in no line")
        if step < config.num_steps:
            raise Preempted(step, directory)
    return state


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
        raise ValueError(
            f"the network is for {num_classes} classes, {dataset.name} has {dataset.num_classes}"
        )
    mesh = parallel.make_mesh(config.fsdp)
    if config.batch_size % (mesh.size * config.accumulate):
        raise ValueError(
            f"batch_size = {config.batch_size} in accumulate = {config.accumulate} parts cannot be "
            f"split over {mesh.size} devices: make it a multiple of "
            f"{mesh.size * config.accumulate}"
        )
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
    facts = {"prediction": config.prediction, **(facts or {})}
    if facts["prediction"] != config.prediction:
        raise ValueError(
            f"facts say that the network predicts {facts['prediction']!r}, config.prediction that "
            f"it learns {config.prediction!r}: leave it out of facts"
        )
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
    free = {*FREE_ON_RESUME, *ROUNDS_ON_RESUME}
    if wanted["train"].get("cosine_decay"):
        free.remove("train.num_steps")

    def among(names: Callable[[str], bool]) -> list[str]:
        both = ({k: v for k, v in flat(config).items() if names(k)} for config in (saved, wanted))
        return differences(*both)

    if differ := among(lambda name: name not in free):
        raise ValueError(
            "\n".join(["a resumed run must keep its configuration, but these differ:", *differ])
        )
    return among(lambda name: name in ROUNDS_ON_RESUME)


def _check_facts(
    config: dict[str, Any],
    params: Params,
    schedule: Schedule,
    dataset: Dataset,
    num_classes: int | None,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Says at the start of a run what `load_model` would say of it in the end."""
    from ddim_jax.networks.unet import abstract_params, check_params

    try:
        schedule_config, model = from_facts(config)
        built = schedule_config.build()
    except ValueError as error:
        if jax.process_index() == 0:
            say(
                f"warning: load_model and `ddim-jax sample` will not read this run ({error}). For "
                "a U-Net of ours give fit(..., facts=to_facts(schedule_config, unet_config)), of "
                "ddim_jax.pretrained; of a network of your own read the moving average with "
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
    if model.image_shape != dataset.image_shape:
        raise ValueError(
            f"the network of facts has images {model.image_shape}, {dataset.name} has "
            f"{dataset.image_shape}: set image_size={dataset.image_shape[:2]} and in_channels="
            f"{dataset.image_shape[2]} in its UNetConfig"
        )


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _restore(
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


def _collect(
    waiting: dict[str, list[float]],
    pending: list[Metrics],
    step: int,
    in_a_row: int,
    dataset: Dataset,
    config: TrainConfig,
) -> int:
    """Fetches the metrics of the steps up to `step`; FloatingPointError names the first bad one.

    Takes and returns the number of updates skipped in a row.
    """
    fetched = jax.device_get(pending)  # waits for the devices
    for at, metrics in enumerate(fetched, start=step - len(fetched) + 1):
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad and not (config.skip_nonfinite and math.isfinite(values["param_norm"])):
            images = batch_indices(dataset, config.batch_size, config.seed, at - 1)
            raise FloatingPointError(
                f"{bad[0]} is {values[bad[0]]} at step {at}: training stopped. Its batch was "
                f"images {_first(images)} of {dataset.name}. Checkpoints are from before it; try a "
                "lower learning_rate or grad_clip in a new run, or skip_nonfinite"
            )
        waiting.setdefault("skipped", []).append(float(bool(bad)))
        for name, value in values.items():
            waiting.setdefault(name, []).extend([] if bad else [value])
        in_a_row = in_a_row + 1 if bad else 0
        if in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the {MAX_SKIPPED} updates up to step {at} were all skipped, as none had a finite "
                "loss and gradient: training stopped"
            )
    return in_a_row


def _means(waiting: Mapping[str, list[float]], config: TrainConfig) -> dict[str, float]:
    means = {name: sum(v) / len(v) for name, v in waiting.items() if name != "skipped"}
    return means | ({"skipped": sum(waiting["skipped"])} if config.skip_nonfinite else {})


def _first(images: np.ndarray, count: int = 8) -> str:
    more = f", … ({len(images)} in all)" if len(images) > count else ""
    return ", ".join(str(i) for i in images[:count]) + more


def _make_preview(
    apply_fn: ApplyFn,
    schedule: Schedule,
    image_shape: tuple[int, int, int],
    num_classes: int | None,
    mesh: Mesh,
    seed: int,
    say: Callable[[str], None],
) -> Callable[[Params, int, MetricsLog], None]:
    """Draws the same x_T with the moving average, η = 0; process 0 does so, on its first device."""
    gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(mesh))

    tau = timesteps(schedule.num_steps, min(PREVIEW_STEPS, schedule.num_steps))
    sampler = make_sampler(Model(apply_fn, None, schedule), tau)
    labels = {} if num_classes is None else {"labels": jnp.arange(PREVIEW_IMAGES) % num_classes}

    def preview(ema: Params, step: int, log: MetricsLog) -> None:
        whole = gather(ema)
        if image_shape[2] not in (1, 3):
            say(f"no picture of step {step}: images have {image_shape[2]} channels")
        elif jax.process_index() == 0:
            own = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
            x_T = initial_noise(jax.random.key(seed), PREVIEW_IMAGES, image_shape)
            images = np.asarray(sampler(x_T, params=own, **labels))
            if np.isfinite(images).all():
                log.picture(step, grid(images, scale=max(1, 64 // image_shape[0])))
            else:
                say(f"no picture of step {step}: the samples are not finite")

    return preview
