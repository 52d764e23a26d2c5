"""`ddim-jax train`."""

# No `from __future__ import annotations`: tyro reads the presets off an annotation.
import dataclasses
import inspect
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import tyro

from ddim_jax.arrays import import_name
from ddim_jax.cli.options import ProcessOptions, Source, check_writable, describe
from ddim_jax.cli.runs import check_apart, draw_loss, tell
from ddim_jax.data import Dataset
from ddim_jax.networks.unet import abstract_params, build, count_params
from ddim_jax.storage.checkpoint import restore_config
from ddim_jax.storage.checkpoint_folder import saved_steps
from ddim_jax.training import fitting
from ddim_jax.training.loop import fit
from ddim_jax.training.presets import PRESETS, Fitted, Preset
from ddim_jax.training.resuming import check_run, check_same_run
from ddim_jax.training.starting import Start, check_same_start, facts_of_run, follow, start_from
from ddim_jax.training.step import objective
from ddim_jax.training.watching import PROJECT, check_wandb
from ddim_jax.weights import Model, from_facts, to_facts

# A preset of the user's own, module:function, is one more choice, if the line asks for it.
MAKERS = {**PRESETS, **{w: import_name(w, "preset") for w in sys.argv[2:3] if ":" in w}}
CHOICE: Any = tyro.extras.subcommand_type_from_defaults(
    {name: make() for name, make in MAKERS.items()},
    {name: inspect.getdoc(make) or "" for name, make in MAKERS.items()},
    prefix_names=False,
)


def train(
    preset: Annotated[CHOICE, tyro.conf.arg(name="")],
    processes: ProcessOptions,
    out: pathlib.Path | None = None,
    data_dir: pathlib.Path | None = None,
    init: str | None = None,
    init_as: Source = Source(),  # noqa: B008
    resume: Literal["never", "auto", "must"] = "never",
    fallback: bool = False,
    wandb: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[PROJECT]")] = None,
    dry_run: bool = False,
) -> None:
    """Train a preset on all devices; every field of it can be overridden.

    SIGTERM or Ctrl-C saves and exits with code 75; the same command with --resume auto goes on.

    Args:
      preset: what to train, or module:function of your own, which returns a `Preset`.
      out: the run folder, runs/PRESET by default.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      init: fine-tune a model: a shipped name, a run folder, a weights file, a diffusers folder, a
        PyTorch file, org/name on the Hub. Network, schedule and prediction are its own; classes may
        be added.
      init_as: what the model's file does not say, or which of its contents is meant.
      resume: "never": `out` must not hold a run. "must": continue from its last checkpoint.
        "auto": continue where there is one, begin where there is none.
      fallback: on resuming, pass over damaged checkpoints (they are moved to damaged/).
      wandb: send metrics and pictures to Weights & Biases too, "ddim_jax" if no project is named.
      dry_run: check what a run would, print the configuration and the parameter count, and stop.
    """
    out = out or pathlib.Path("runs") / preset.name
    project = _project(wandb)
    if init is None and init_as != Source():
        raise ValueError("--init-as says how to read --init: give --init too")
    if not dry_run:
        processes.join()
    check_writable(out / "checkpoints")
    check_apart(out, preset.data.name, data_dir)
    if project is not None:
        check_wandb(out, project)
    given = _given(sys.argv)
    if isinstance(preset, Fitted):
        fitting.check_minutes(preset, given)
    saved = {} if resume == "never" else facts_of_run(out)
    model = None if init is None else init_as.load(init)
    origin = model.facts if model else saved if "init" in saved else None
    if origin is not None:
        preset = follow(preset, given, origin, init or str(out))
    objective(preset.schedule.build(), preset.train)
    dataset, missing = _data(preset, data_dir, dry_run)
    if isinstance(preset, Fitted) and dataset:
        preset = _fitted(preset, given, dataset, saved, network=origin is None)
    if dataset:
        _check_shape(dataset, preset, init)
        _check_labels(dataset, preset, given)
    start = None
    if model and init:
        start = _tuned(preset, model, init, dataset.label_names if dataset else None)
        check_same_start(saved, start.facts, str(out))
    facts = {
        "preset": preset.name,
        **(start.facts if start else to_facts(preset.schedule, preset.model)),
    }
    if dry_run:
        count = count_params(abstract_params(preset.model))
        whole = {**dataclasses.asdict(preset), "model": preset.model.facts()}
        print(describe({**whole, "parameters": count, "out": str(out)}))
        print(missing if dataset is None else _checked(preset, dataset, out, facts, resume))
        return
    assert dataset is not None
    start = start or _fresh(preset)
    if isinstance(preset, Fitted) and preset.minutes is not None and not saved:
        check_run(dataset, preset.train, out, facts, preset.model.num_classes, resume)
        preset = _timed(preset, given, start, dataset)
    if isinstance(preset, Fitted):
        count, kind = count_params(start.params), jax.devices()[0].device_kind
        tell(fitting.describe_fit(preset, count, len(dataset), kind))
    tell(
        f"training {preset.name}: {count_params(start.params):,} parameters, {len(dataset):,} "
        f"images, on {jax.device_count()} {jax.devices()[0].device_kind} in "
        f"{jax.process_count()} process(es), into {out}"
    )
    fit(
        start.apply_fn,
        start.params,
        start.schedule,
        dataset,
        preset.train,
        out,
        facts=facts,
        num_classes=preset.model.num_classes,
        resume=resume,
        fallback=fallback,
        wandb=project,
        say=tell,
    )
    draw_loss(out)
    if dataset.skipped:
        tell(f"{len(dataset.skipped)} corrupt records were left out: {dataset.skipped[:20]}")
    tell(f"done: {out}/loss.png, {out}/samples; draw with: ddim-jax sample {shlex.quote(str(out))}")


def _given(words: list[str]) -> set[str]:
    """The fields of the preset that a command line sets: "model.image_size", "train.flip"."""
    options = [word.partition("=")[0][2:].replace("-", "_") for word in words if word[:2] == "--"]
    return {option.replace(".no_", ".") for option in options if "." in option}


def _project(wandb: tuple[str, ...] | None) -> str | None:
    """Of --wandb, which takes one name or none."""
    if wandb and len(wandb) > 1:
        raise ValueError(f"--wandb takes one project, got {' '.join(wandb)}")
    return None if wandb is None else (*wandb, PROJECT)[0]


def _fresh(preset: Preset) -> Start:
    """Where a run starts that starts from no model."""
    made = build(preset.model, jax.random.key(preset.train.seed))
    return Start(*made, preset.schedule.build(), to_facts(preset.schedule, preset.model))


def _tuned(
    preset: Preset, model: Model, init: str, label_names: Sequence[str] | None = None
) -> Start:
    """Where fine-tuning starts, told."""
    start = start_from(model, preset.model, init)
    has, wanted = model.config.num_classes, preset.model.num_classes
    classes = "" if wanted is None else f", its table of {wanted} classes kept"
    pairs = zip(model.label_names or (), label_names or ())
    if classes and (renamed := [f"{old} is now {new}" for old, new in pairs if old != new]):
        classes += f" ({', '.join(renamed)})"
    if has != wanted:
        classes = (
            ", as it is without a label"
            if wanted is None
            else f", with a new table of {wanted} classes, each at first as without a label"
        )
    tell(f"starting from {init} ({start.facts['init']['sha256'][:12]}…){classes}")
    return start


def _fitted(
    preset: Fitted, given: set[str], dataset: Dataset, saved: dict[str, Any], network: bool
) -> Fitted:
    """A preset that suits the images, or as it was when the run began."""
    if not saved:
        return fitting.fit_preset(preset, given, dataset.image_shape, network=network)
    learned = dataclasses.asdict(from_facts(saved)[1])
    return fitting.filled(preset, given, learned, saved["train"])


def _timed(preset: Fitted, given: set[str], start: Start, dataset: Dataset) -> Fitted:
    """A preset of as many updates as fit into its minutes."""
    if jax.process_count() > 1:
        raise ValueError("--minutes is for one process: give --train.num-updates")
    tell("timing a few updates")
    train, classes = preset.train, preset.model.num_classes
    part = max(train.batch_size // jax.device_count(), 1)
    few = dataclasses.replace(train, batch_size=part, accumulate=1)
    seconds = fitting.time_update(
        start.apply_fn, start.params, start.schedule, few, dataset.image_shape, classes
    )
    return fitting.lasting(preset, given, seconds)


def _data(
    preset: Preset, data_dir: pathlib.Path | None, dry_run: bool
) -> tuple[Dataset | None, str]:
    """The data; in a dry run, where they are not here, what is said of that."""
    if not preset.data.name:
        raise ValueError(f"{preset.name} trains on images of your own: give --data.name DIR")
    try:
        return preset.data.load(data_dir), ""
    except ValueError as error:
        if not dry_run or not str(error).startswith("no data set"):
            raise
        return None, f"not checked, as the data are not here: {str(error).splitlines()[0]}"


def _check_labels(dataset: Dataset, preset: Preset, given: set[str]) -> None:
    """Raises ValueError where labels that were asked for would not be learned."""
    learned = preset.model.num_classes is not None or "model.num_classes" in given
    if preset.data.labels is not None and not learned:
        raise ValueError(
            f"--data.labels gives {preset.data.name} {dataset.num_classes} classes, which this "
            f"network does not learn: add --model.num-classes {dataset.num_classes}, or None to "
            "learn without"
        )


def _check_shape(dataset: Dataset, preset: Preset, init: str | None) -> None:
    """Raises ValueError where the data are not of the network's shape."""
    has, takes = dataset.image_shape, preset.model.image_shape
    if has != takes:
        change = "set --model.image-size and --model.in-channels, or --data.resize"
        if init is not None:
            change = f"bring them there with --data.resize {min(takes[:2])} or --data.crop"
            if has[2] != takes[2]:
                change = f"{init} cannot learn images of {has[2]} channels"
        raise ValueError(
            f"data set {preset.data.name} has images {has}, the network takes {takes}: {change}"
        )


def _checked(
    preset: Preset,
    dataset: Dataset,
    out: pathlib.Path,
    facts: dict[str, Any],
    resume: Literal["never", "auto", "must"],
) -> str:
    """What a run would check before its first step, in a line; raises what it would."""
    model = preset.model
    mesh, config = check_run(dataset, preset.train, out, facts, model.num_classes, resume)
    done = saved_steps(out / "checkpoints")
    if done:
        check_same_run(restore_config(out / "checkpoints"), config)
    return f"checked: {len(dataset):,} images, {mesh.size} devices, " + (
        f"goes on from step {done[-1]}" if done else "begins at step 0"
    )
