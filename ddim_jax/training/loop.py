"""The training loop: data in, steps, metrics, pictures, checkpoints; stopped and taken up at will.

A checkpoint holds everything that the next step depends on, the metrics not yet logged included;
so a resumed run is the unbroken run, bit for bit.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal

import jax
from jax.tree_util import Partial
from tqdm import tqdm

from ddim_jax.data import Dataset
from ddim_jax.networks.flops import flops_per_image
from ddim_jax.process.predictor import predicts
from ddim_jax.process.schedule import Schedule
from ddim_jax.storage.checkpoint import Checkpoints
from ddim_jax.training import averages, parallel
from ddim_jax.training.collecting import Collected, Meter, forecast
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.feeding import Feed, make_update, steps_per_call
from ddim_jax.training.held_out import make_held_out
from ddim_jax.training.preview import Preview
from ddim_jax.training.resuming import check_facts, check_run, take_up
from ddim_jax.training.run_folder import MetricsLog, Preempted, StopSignals, locked
from ddim_jax.training.step import (
    DENOISING,
    ApplyFn,
    Params,
    TrainState,
    make_train_step,
    objective,
)
from ddim_jax.training.watching import check_wandb

FIRST_MINUTE = 60.0  # seconds of steps after which the user is told how long the run will take


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
    loss: Partial = DENOISING,
    resume: Literal["never", "auto", "must"] = "never",
    fallback: bool = False,
    wandb: str | None = None,
    progress: bool = True,
    on_log: Callable[[TrainState, dict[str, float]], None] | None = None,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Trains, or continues training, in a run folder, on all devices of all processes.

    The folder gets `checkpoints/`, `metrics.jsonl`, `samples/` and TensorBoard's event file. A line
    of metrics every `log_every` steps holds the step, means of loss, gradient and parameter norm
    since the last line, images per second, FLOP/s of the network's forward and backward pass, their
    share of the devices' peak where that is known ("mfu"), and seconds since the start. With images
    held out (`data.hold_out`) the first line after each picture or checkpoint has their loss too,
    of the weights and of their average (`make_held_out`). After the first minute the user is told
    the speed, the time left and how long compiling took.

    Off a CPU images that fit lie on each device, and one call makes many updates (`feeding`): the
    host has nothing to do in a step's time. It waits for no call but the one `IN_FLIGHT` before;
    data, steps, checkpoints and the compiling of pictures go on at the same time. Losses and
    gradients are looked at when they are logged, always before a checkpoint: a run that diverges
    stops at the next line, names the first bad step and its images, and leaves only good
    checkpoints.

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
        does not read the run; a warning says so at the start. Of a run that goes on from a
        trained model, those of `start_from`, which also gives apply_fn and params. A "tau" among
        them is the one that the network is for, and pictures are drawn along it.
      num_classes: see `make_train_step`.
      loss: in place of Eq. 5, see what `make_train_step` returns: `distilling.taught_by` for one.
      resume: "never": the folder must not hold a run. "must": continue from its latest checkpoint.
        "auto": continue where there is a checkpoint, begin where there is none.
      fallback: where the latest checkpoint is damaged, say so, move it to `damaged/` and continue
        from the newest intact one.
      wandb: a project of Weights & Biases, to send metrics and pictures to. The run folder keeps
        the id of the run there, which a resumed run goes on with.
      progress: show a progress bar on stderr.
      on_log: called with the state and each line of metrics; the state dies with the next step,
        so copy what you keep.
      say: told what the user should know.

    Returns:
      The state after `config.num_updates` steps.

    Raises:
      FileExistsError: the folder holds a run and `resume` is "never".
      BlockingIOError: another process trains in the folder.
      CheckpointError: nothing to resume, no readable checkpoint that fits `params`, or a checkpoint
        could not be written.
      ValueError: the saved configuration differs, and the message shows where; ε is to be learned
        at zero terminal SNR; the batch cannot be split over the devices; or `facts` tell of another
        schedule, or of a U-Net with other parameters, classes or images.
      RuntimeError: worker processes, and a main script without `if __name__ == "__main__":`.
      ModuleNotFoundError: `wandb` is asked for, and not installed.
      FloatingPointError: a loss or gradient is not finite.
      Preempted: a signal asked to stop, and the state is saved.
    """
    directory = pathlib.Path(directory)
    folder = directory / "checkpoints"
    apply_fn = predicts(apply_fn, objective(schedule, config)[0], schedule=schedule)
    mesh, facts = check_run(dataset, config, directory, facts, num_classes, resume)
    check_facts(facts, params, schedule, dataset, num_classes, folder, say)
    if wandb is not None:
        check_wandb(directory, wandb)
    loss = jax.device_put(loss, parallel.replicated(mesh))
    with locked(directory), StopSignals() as signals:
        state, start, waiting = take_up(folder, params, config, mesh, fallback, say, facts)
        kept = averages.begin(directory, state.params, start) if config.post_hoc else []
        follow = averages.follow if config.post_hoc else averages.leave
        size = (config.batch_size, *dataset.image_shape)
        flops = 3 * flops_per_image(apply_fn, state.params, size, num_classes)
        peak = parallel.peak_flops(jax.devices()[0].device_kind)
        calls = steps_per_call(config, start, flops * config.batch_size / mesh.size, peak)
        train_step = make_train_step(apply_fn, schedule, config, num_classes, mesh)
        preview = Preview(apply_fn, schedule, size[1:], num_classes, mesh, config.seed, say,
                          facts.get("tau"))  # fmt: skip
        held_out = make_held_out(
            apply_fn, schedule, dataset.held_out, config, num_classes, mesh, loss
        )
        collected = Collected(config, dataset, **waiting)
        meter = Meter(config, flops, peak and peak * mesh.size, start)
        step, owed, stop, told = start, False, False, False  # a line; to end early; how long
        shown = progress and jax.process_index() == 0

        def write_line(step: int) -> None:
            collected.fetch(step)
            if means := collected.means():
                line = meter.line(step, means, collected.ended)
                log.line(line)
                speed = line["images_per_second"]
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {speed:.3g} images/s")
                if on_log:
                    on_log(state, line)

        with (
            Checkpoints(folder, config.keep) as checkpoints,
            MetricsLog(directory, start, wandb, facts) as log,
            tqdm(total=config.num_updates, initial=start, unit="step", disable=not shown) as bar,
        ):
            if step < config.num_updates:
                bar.set_postfix_str("compiling")
                feed = Feed(dataset, config, mesh, start, calls)
                update = make_update(train_step, follow, feed, state, kept, loss,
                                     config.num_updates)  # fmt: skip
                compiling = meter.seconds
                bar.set_postfix_str(f"compiled in {compiling:.0f} s")
                bar.unpause()  # the clock of its speed
                if config.sample_every:
                    preview.prepare(state.ema)
                meter.reset()
            while step < config.num_updates and not stop:
                state, kept, metrics = update(state, kept)
                if owed:  # of the calls before this one, with which the devices are busy now
                    write_line(step)
                step += calls
                collected.add(metrics)
                bar.update(calls)
                last = step == config.num_updates
                stop = signals.requested(step // calls) and not last
                at_checkpoint = step % config.checkpoint_every == 0 or last
                to_save = at_checkpoint or stop
                to_log = step % config.log_every == 0 or last
                drawn = config.sample_every and (step % config.sample_every == 0 or last)
                if not told and (passed := meter.seconds) > FIRST_MINUTE and not last:
                    told, left = True, config.num_updates - step
                    say(forecast(step - start, left, passed, compiling, config.batch_size))
                owed = to_log and not (to_save or drawn or on_log)
                if to_save:
                    collected.fetch(step)
                if held_out and (at_checkpoint or drawn):
                    collected.measured(held_out(state))
                if to_log and not owed:
                    write_line(step)
                if drawn and not stop:
                    preview(state.ema, step, log)
                if to_save and config.post_hoc:
                    averages.store(directory, kept, step)
                if to_save:
                    checkpoints.save(step, state, collected.position(step), facts)
        waiting = collected.waiting
        if waiting.get("skipped") and not stop:
            say(f"the last {len(waiting['skipped'])} updates were skipped, and are in no line")
        if step < config.num_updates:
            raise Preempted(step, directory)
    return state
