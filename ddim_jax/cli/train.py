"""`ddim-jax train`."""

# No `from __future__ import annotations`: tyro reads the presets off an annotation.
import dataclasses
import inspect
import pathlib
import sys
from typing import Annotated, Any, Literal

import jax
import tyro

from ddim_jax.arrays import import_name
from ddim_jax.cli.options import ProcessOptions, check_writable, describe
from ddim_jax.data import Dataset
from ddim_jax.networks.unet import abstract_params, build, count_params
from ddim_jax.pictures import plots
from ddim_jax.storage.checkpoint import restore_config, saved_steps
from ddim_jax.storage.files import write_whole
from ddim_jax.training.loop import fit
from ddim_jax.training.presets import PRESETS, Preset
from ddim_jax.training.resuming import check_run, check_same_run
from ddim_jax.training.run_folder import read_metrics
from ddim_jax.training.step import objective
from ddim_jax.weights import to_facts

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
    resume: Literal["never", "auto", "must"] = "never",
    fallback: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a preset on all devices; every field of it can be overridden.

    SIGTERM or Ctrl-C saves and exits with code 75; the same command with --resume auto goes on.

    Args:
      preset: what to train, or module:function of your own, which returns a `Preset`.
      out: the run folder, runs/PRESET by default.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      resume: "never": `out` must not hold a run. "must": continue from its last checkpoint.
        "auto": continue where there is one, begin where there is none.
      fallback: on resuming, pass over damaged checkpoints (they are moved to damaged/).
      dry_run: check what a run would, print the configuration and the parameter count, and stop.
    """
    out = out or pathlib.Path("runs") / preset.name
    if not dry_run:
        processes.join()
    schedule = preset.schedule.build()
    objective(schedule, preset.train)
    check_writable(out / "checkpoints")
    facts = {"preset": preset.name, **to_facts(preset.schedule, preset.model)}
    if dry_run:
        shapes = abstract_params(preset.model)
        print(
            describe(
                {**dataclasses.asdict(preset), "parameters": count_params(shapes), "out": str(out)}
            )
        )
        print(_checked(preset, data_dir, out, facts, resume))
        return
    dataset = _load(preset, data_dir)
    apply_fn, params = build(preset.model, jax.random.key(preset.train.seed))

    def say(text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)

    say(
        f"training {preset.name}: {count_params(params):,} parameters, {len(dataset):,} images, on "
        f"{jax.device_count()} {jax.devices()[0].device_kind} in {jax.process_count()} "
        f"process(es), into {out}"
    )
    fit(
        apply_fn,
        params,
        schedule,
        dataset,
        preset.train,
        out,
        facts=facts,
        num_classes=preset.model.num_classes,
        resume=resume,
        fallback=fallback,
        say=say,
    )
    if jax.process_index() == 0:
        curve = plots.png_bytes(plots.loss_curve(read_metrics(out / "metrics.jsonl")))
        write_whole(out / "loss.png", curve)
    if dataset.skipped:
        say(f"{len(dataset.skipped)} corrupt records were left out: {dataset.skipped[:20]}")
    say(f"done: {out}/loss.png, {out}/samples; draw with: ddim-jax sample {out}")


def _load(preset: Preset, data_dir: pathlib.Path | None) -> Dataset:
    """The data, if they are of the network's shape."""
    dataset = preset.data.load(data_dir)
    if dataset.image_shape != preset.model.image_shape:
        raise ValueError(
            f"data set {preset.data.name} has images {dataset.image_shape}, the network takes "
            f"{preset.model.image_shape}: set --model.image-size and --model.in-channels, or "
            "--data.resize"
        )
    return dataset


def _checked(
    preset: Preset,
    data_dir: pathlib.Path | None,
    out: pathlib.Path,
    facts: dict[str, Any],
    resume: Literal["never", "auto", "must"],
) -> str:
    """What a run would check before its first step, in a line; raises what it would."""
    try:
        dataset = _load(preset, data_dir)
    except ValueError as error:
        if not str(error).startswith("no data set"):
            raise
        return f"not checked, as the data are not here: {str(error).splitlines()[0]}"
    model = preset.model
    mesh, config = check_run(dataset, preset.train, out, facts, model.num_classes, resume)
    done = saved_steps(out / "checkpoints")
    if done:
        check_same_run(restore_config(out / "checkpoints"), config)
    return f"checked: {len(dataset):,} images, {mesh.size} devices, " + (
        f"goes on from step {done[-1]}" if done else "begins at step 0"
    )
