"""The command `ddim-jax`: train a network, draw with it, and look at runs."""

import dataclasses
import inspect
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np
import tyro

from ddim_jax.clipping import clip_x0
from ddim_jax.pretrained import load_model, to_facts
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.timesteps import timesteps
from ddim_jax.unet import abstract_params, build, count_params

if TYPE_CHECKING:
    from ddim_jax.presets import Preset

ERRORS = (ValueError, TypeError, OSError, ArithmeticError, ModuleNotFoundError)
app = tyro.extras.SubcommandApp()


@app.command
def sample(
    model: tyro.conf.Positional[str],
    num_images: int = 64,
    steps: int = 50,
    eta: float = 0.0,
    spacing: str = "linear",
    sigma_hat: bool = False,
    clip: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    out: pathlib.Path | None = None,
    overwrite: bool = False,
) -> None:
    """Draw images with a trained model, and save them as one PNG.

    Args:
      model: "digits" (ships with the package), a run folder, or a .safetensors file.
      num_images: how many; image k is the same whatever their number.
      steps: S, the number of network calls per image.
      eta: 0 is DDIM, 1 is DDPM.
      spacing: of τ: linear, quadratic, uniform, quad, leading, trailing, linspace, logsnr.
      sigma_hat: the larger noise of DDPM; takes eta = 1.
      clip: clip each predicted x_0 to [−1, 1].
      seed: of x_T and of the noise.
      batch_size: images at a time.
      out: the file; by default named after model, steps, eta and seed, in the current folder.
      overwrite: replace the file if it exists.
    """
    from ddim_jax.images import grid, save_png

    if num_images < 1 or batch_size < 1:
        raise ValueError(f"need at least one image, got {num_images} in batches of {batch_size}")
    if sigma_hat and eta != 1.0:
        raise ValueError(f"--sigma-hat takes --eta 1 (App. D.3), got --eta {eta:g}")
    stem = pathlib.Path(model).resolve().stem
    out = out or pathlib.Path(f"{stem}-S{steps}-eta{eta:g}-seed{seed}.png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, the format written, got {out}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another --out, or pass --overwrite")
    loaded = load_model(model)
    schedule = loaded.schedule
    tau = timesteps(schedule.num_steps, steps, spacing, schedule=schedule)
    sampler = make_sampler(
        loaded.apply_fn,
        schedule,
        tau,
        eta,
        use_sigma_hat=sigma_hat,
        x0_fn=clip_x0(1.0) if clip else None,
    )
    key, noise_key = jax.random.split(jax.random.key(seed))
    images = []
    for start in range(0, num_images, batch_size):
        # Whole batches, so that the last one does not compile anew.
        indices = np.arange(start, start + min(batch_size, num_images))
        x_T = initial_noise(key, indices, loaded.image_shape)
        noisy = noise_key if eta > 0 else None
        images.append(np.asarray(sampler(loaded.params, x_T, noisy, indices=indices)))
    drawn = np.concatenate(images)[:num_images]
    if not np.isfinite(drawn).all():
        raise FloatingPointError("the samples are not finite: the model may be damaged")
    scale = max(1, 64 // drawn.shape[1])
    facts = {"model": model, "steps": steps, "eta": eta, "spacing": spacing, "seed": seed}
    text = {"ddim_jax": json.dumps(facts)}
    save_png(out, grid(drawn, scale=scale), text=text, overwrite=overwrite)
    print(f"wrote {out}: {num_images} images, S = {steps}, eta = {eta:g}, seed {seed}")


@app.command
def info(model: tyro.conf.Positional[str]) -> None:
    """Say what a model or a run is: configuration, progress, checkpoints.

    Args:
      model: "digits" (ships with the package), a run folder, or a .safetensors file.
    """
    loaded = load_model(model)
    facts = {**loaded.facts, "parameters": count_params(loaded.params)}
    folder = pathlib.Path(model)
    if folder.is_dir():
        from ddim_jax.checkpoint import saved_steps

        facts["checkpoints"] = saved_steps(folder / "checkpoints")
        log = folder / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [
            line for line in lines if line.endswith("\n")
        ]  # a killed run may leave half a line
        facts["last metrics"] = json.loads(whole[-1]) if whole else None
        files = [path for path in folder.rglob("*") if path.is_file()]
        facts["megabytes"] = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    print(_describe(facts))


@app.command
def export(
    run: tyro.conf.Positional[pathlib.Path],
    out: tyro.conf.Positional[pathlib.Path],
    float16: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the moving average of a run's latest checkpoint as one .safetensors file.

    Args:
      run: the run folder.
      out: the file to write.
      float16: halve the file; weights are rounded to 11 bits and read back as float32.
      overwrite: replace the file if it exists.
    """
    from ddim_jax.weights import save_weights

    if not run.is_dir():
        raise ValueError(f"{run} is not a run folder; the shipped models are weights files already")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another file, or pass --overwrite")
    loaded = load_model(run)
    save_weights(out, loaded.params, loaded.facts, float16=float16, overwrite=overwrite)
    print(f"wrote {out}: {count_params(loaded.params):,} parameters; ddim-jax sample {out}")


def _train(
    preset: "Preset",
    out: pathlib.Path | None,
    data_dir: pathlib.Path | None,
    resume: bool,
    dry_run: bool,
) -> None:
    from ddim_jax import plots
    from ddim_jax.data import load
    from ddim_jax.training import fit

    schedule = preset.schedule.build()
    shapes = abstract_params(preset.model)
    out = out or pathlib.Path("runs") / preset.name
    if dry_run:
        facts = {**dataclasses.asdict(preset), "parameters": count_params(shapes), "out": str(out)}
        print(_describe(facts))
        return
    dataset = load(preset.data.name, preset.data.split, data_dir, preset.data.transform)
    model = preset.model
    wanted = (model.image_size, model.image_size, model.in_channels)
    if dataset.image_shape != wanted:
        raise ValueError(
            f"data set {preset.data.name} has images {dataset.image_shape}, the network takes "
            f"{wanted}: set --model.image-size and --model.in-channels, or --data.resize"
        )
    apply_fn, params = build(model, jax.random.key(preset.train.seed))
    print(
        f"training {preset.name}: {count_params(params):,} parameters, {len(dataset):,} images, on "
        f"{jax.default_backend()}, into {out}"
    )
    facts = {"preset": preset.name, **to_facts(preset.schedule, model)}
    fit(
        apply_fn,
        params,
        schedule,
        dataset,
        preset.train,
        out,
        facts=facts,
        num_classes=model.num_classes,
        resume=resume,
    )
    curve = plots.png_bytes(plots.loss_curve(plots.read_metrics(out / "metrics.jsonl")))
    (out / "loss.png").write_bytes(curve)
    print(f"done: {out}/loss.png; draw with: ddim-jax sample {out}")


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


def _add_training_commands() -> None:
    from ddim_jax.presets import PRESETS

    choice = tyro.extras.subcommand_type_from_defaults(
        {name: make() for name, make in PRESETS.items()},
        {name: inspect.getdoc(make) or "" for name, make in PRESETS.items()},
        prefix_names=False,
    )

    def train(
        preset: Annotated[choice, tyro.conf.arg(name="")],  # type: ignore[valid-type]
        out: pathlib.Path | None = None,
        data_dir: pathlib.Path | None = None,
        resume: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Train a preset; every field of it can be overridden.

        Args:
          preset: what to train.
          out: the run folder, runs/PRESET by default; must not hold a run.
          data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
          resume: continue the run in `out` from its last checkpoint.
          dry_run: print the resolved configuration and the parameter count, and stop.
        """
        _train(preset, out, data_dir, resume, dry_run)

    app.command(train)
    app.command(name="demo")(_demo)


def _describe(facts: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", _describe(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value:,}" if isinstance(value, int) and not
                         isinstance(value, bool) else f"{indent}{name}: {value}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """The console script; errors of use become a message and exit code 1."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache / "ddim_jax"))
    try:
        _add_training_commands()
    except ModuleNotFoundError as error:
        if {"train", "demo"} & set(sys.argv[1:2]):
            sys.exit(f"ddim-jax: {error}; training needs: pip install 'ddim_jax[train]'")
    try:
        app.cli(prog="ddim-jax", description=__doc__, config=(tyro.conf.CascadeSubcommandArgs,))
    except ERRORS as error:
        if os.environ.get("DDIM_JAX_TRACEBACK"):
            raise
        sys.exit(f"ddim-jax: error: {error}\n(DDIM_JAX_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
