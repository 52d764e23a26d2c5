"""The commands that need the training extras: train, demo, data, evaluate."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from typing import Annotated, Any, Literal

import jax
import tyro

from ddim_jax import data as data_module
from ddim_jax import plots
from ddim_jax._files import write_whole
from ddim_jax.cli import ProcessOptions, describe
from ddim_jax.loop import fit
from ddim_jax.presets import PRESETS, DataConfig, Preset
from ddim_jax.pretrained import to_facts
from ddim_jax.run_folder import read_metrics
from ddim_jax.unet import abstract_params, build, count_params


def add_commands(app: Any) -> None:
    """Adds train, demo, data and evaluate to the command's app."""
    choice = tyro.extras.subcommand_type_from_defaults(
        {name: make() for name, make in PRESETS.items()},
        {name: inspect.getdoc(make) or "" for name, make in PRESETS.items()},
        prefix_names=False,
    )

    def train(
        preset: choice,  # type: ignore[valid-type]
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
          preset: what to train.
          out: the run folder, runs/PRESET by default.
          data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
          resume: "never": `out` must not hold a run. "must": continue from its last checkpoint.
            "auto": continue where there is one, begin where there is none.
          fallback: on resuming, pass over damaged checkpoints (they are moved to damaged/).
          dry_run: print the resolved configuration and the parameter count, and stop.
        """
        if not dry_run:
            processes.join()
        _train(preset, out, data_dir, resume, fallback, dry_run)

    train.__annotations__["preset"] = Annotated[choice, tyro.conf.arg(name="")]
    app.command(train)
    app.command(name="demo")(_demo)
    app.command(name="data")(_data)
    app.command(name="evaluate")(_evaluate)


def _train(
    preset: Preset,
    out: pathlib.Path | None,
    data_dir: pathlib.Path | None,
    resume: Literal["never", "auto", "must"],
    fallback: bool,
    dry_run: bool,
) -> None:
    schedule = preset.schedule.build()
    shapes = abstract_params(preset.model)
    out = out or pathlib.Path("runs") / preset.name
    if dry_run:
        facts = {**dataclasses.asdict(preset), "parameters": count_params(shapes), "out": str(out)}
        print(describe(facts))
        return
    dataset = preset.data.load(data_dir)
    model = preset.model
    if dataset.image_shape != model.image_shape:
        raise ValueError(
            f"data set {preset.data.name} has images {dataset.image_shape}, the network takes "
            f"{model.image_shape}: set --model.image-size and --model.in-channels, or --data.resize"
        )
    apply_fn, params = build(model, jax.random.key(preset.train.seed))

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
        facts={"preset": preset.name, **to_facts(preset.schedule, model)},
        num_classes=model.num_classes,
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


def _demo(
    out: pathlib.Path = pathlib.Path("demo"),
    num_steps: int | None = None,
    num_samples: int = 200,
) -> None:
    """Train on 8×8 digits for a few minutes, and make a page of what the network draws.

    Args:
      out: the folder to write; an interrupted demo is continued.
      num_steps: training steps, the preset's by default.
      num_samples: samples behind each Fréchet distance, ten times as many for S = 50, η = 0.
    """
    from ddim_jax import demo

    if (out / "index.html").exists():
        print(f"{out} holds a finished demo: open {out}/index.html, or choose another --out")
        return
    print(f"open {demo.run(out, num_steps, num_samples)}")


def _data(
    action: tyro.conf.Positional[Literal["list", "prepare"]],
    name: tyro.conf.Positional[str] = "",
    data_dir: pathlib.Path | None = None,
) -> None:
    """List the data sets that are there, or download and prepare one (this needs TensorFlow).

    Args:
      action: "list" or "prepare".
      name: of the TFDS data set to prepare: cifar10, celeb_a, lsun/bedroom.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
    """
    if action == "list":
        print("\n".join(data_module.available(data_dir)))
    elif not name:
        raise ValueError("say which data set to prepare: ddim-jax data prepare cifar10")
    else:
        print(f"prepared: {data_module.prepare(name, data_dir)}")


def _evaluate(
    images: tyro.conf.Positional[pathlib.Path],
    data: str,
    split: str = "train",
    crop: tuple[int, int, int, int] | None = None,
    resize: int | None = None,
    data_dir: pathlib.Path | None = None,
    extractor: str = "pixels",
    reference: pathlib.Path | None = None,
    blocks: int = 20,
) -> None:
    """Compare generated images with a data set: Fréchet distance, KID, precision and recall.

    Args:
      images: a folder of `ddim-jax generate`.
      data: the data set: "digits", or a prepared TFDS data set.
      split: its split.
      crop: what is first cut out of each of its images (top, left, height, width), as in training.
      resize: then bring the shorter side to this, and cut out the centre square.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      extractor: "pixels", "resnet56:FILE" or "inception:FILE"; only the FID weights give a "FID".
      reference: file of the data set's statistics, made if missing; by default beside `images`.
      blocks: of the jackknife behind the standard error; 0 for none, which is faster.
    """
    from ddim_jax.evaluation import evaluate, extractors, reference_statistics
    from ddim_jax.generate import iter_shards

    kind, _, path = extractor.partition(":")
    known = {"pixels": lambda _: extractors.pixels(), "resnet56": extractors.resnet56,
             "inception": extractors.inception}  # fmt: skip
    if kind not in known or (kind != "pixels") != bool(path):
        raise ValueError(
            f"extractor must be pixels, resnet56:FILE or inception:FILE, got {extractor}"
        )
    features = known[kind](path)
    shards = iter_shards(images)
    dataset = DataConfig(data, split, crop, resize).load(data_dir)
    file = reference or images.resolve().with_name(f"{data.replace('/', '_')}-{split}-{kind}.npz")
    print(evaluate(shards, reference_statistics(file, dataset, features), features, blocks=blocks))
