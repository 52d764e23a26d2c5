"""The command `ddim-jax`: train a network, draw with it, and look at runs."""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import tyro

from ddim_jax import parallel
from ddim_jax.sampling.clipping import clip_x0
from ddim_jax.pretrained import Model, load_model, save_diffusers, save_model
from ddim_jax.run_folder import Preempted
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.process.schedule import ScheduleConfig
from ddim_jax.process.spacing import timesteps
from ddim_jax.unet import count_params

ERRORS = (ValueError, TypeError, OSError, ArithmeticError, ModuleNotFoundError)
PREEMPTED = 75  # sysexits' EX_TEMPFAIL: stopped by a signal and saved; run it again
TRAINING = {"train", "demo", "data", "evaluate"}  # the commands of cli_train
INSTALL = "training, runs and evaluation need: pip install 'ddim_jax[train]'"
app = tyro.extras.SubcommandApp()


@dataclasses.dataclass(frozen=True)
class Source:
    """What the model's file does not say, or which of its contents is meant.

    Attributes:
      step: which checkpoint of a run folder, the latest by default.
      config: the network of a PyTorch checkpoint: cifar10, celeba64 or lsun256.
      image_size: of a PyTorch checkpoint of another network, whose shapes tell the rest.
      schedule: of the noise, T = 1000, in place of what the file says; linear is the paper's.
      prediction: what the network predicts, in place of what the file says; noise if neither says.
    """

    step: int | None = None
    config: str | None = None
    image_size: int | None = None
    schedule: Literal["linear", "cosine"] | None = None
    prediction: Literal["eps", "x_0", "v"] | None = None

    def given(self) -> dict[str, Any]:
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }

    def load(self, model: str) -> Model:
        given = self.given()
        if self.schedule:
            given["schedule"] = ScheduleConfig(self.schedule)
        return load_model(model, **given)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw.

    Attributes:
      steps: S, the number of network calls per image.
      eta: 0 is DDIM, 1 is DDPM.
      spacing: of τ: linear, quadratic, uniform, quad, leading, trailing, linspace, logsnr.
      sigma_hat: the larger noise of DDPM; takes eta = 1.
      clip: clip each predicted x_0 to [−1, 1].
      seed: of x_T and of the noise.
    """

    steps: int = 50
    eta: float = 0.0
    spacing: str = "linear"
    sigma_hat: bool = False
    clip: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return f"S = {self.steps}, eta = {self.eta:g}, seed {self.seed}"

    def check(self) -> None:
        if self.sigma_hat and self.eta != 1.0:
            raise ValueError(f"--sigma-hat takes --eta 1 (App. D.3), got --eta {self.eta:g}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2**32 - 1, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes; Slurm, Open MPI and Cloud TPU say these by themselves.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: how many processes take part.
      process_id: which one this is, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def join(self) -> None:
        parallel.initialize(self.coordinator, self.num_processes, self.process_id)


SourceOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Source]
SamplingOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Sampling]
ProcessOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Processes]


@app.command
def sample(
    model: tyro.conf.Positional[str],
    sampling: SamplingOptions,
    source: SourceOptions,
    num_images: int = 64,
    batch_size: int = 64,
    out: pathlib.Path | None = None,
    overwrite: bool = False,
) -> None:
    """Draw images with a trained model, and save them as one PNG.

    Args:
      model: "digits" (ships with the package), a run folder, a .safetensors file, a PyTorch
        checkpoint in the names of Ho et al. and the authors, or a diffusers folder.
      num_images: how many; image k is the same whatever their number.
      batch_size: images at a time.
      out: the file; by default named after model, steps, eta and seed, in the current folder.
      overwrite: replace the file if it exists.
    """
    from ddim_jax.images import grid, save_png

    if num_images < 1 or batch_size < 1:
        raise ValueError(f"need at least one image, got {num_images} in batches of {batch_size}")
    sampling.check()
    steps, eta, seed = sampling.steps, sampling.eta, sampling.seed
    stem = pathlib.Path(model).resolve().stem
    out = out or pathlib.Path(f"{stem}-S{steps}-eta{eta:g}-seed{seed}.png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, the format written, got {out}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another --out, or pass --overwrite")
    loaded = source.load(model)
    schedule = loaded.schedule
    tau = timesteps(schedule.num_steps, steps, sampling.spacing, schedule=schedule)
    sampler = make_sampler(
        loaded.apply_fn,
        schedule,
        tau,
        eta,
        use_sigma_hat=sampling.sigma_hat,
        x0_fn=clip_x0(1.0) if sampling.clip else None,
        prediction=loaded.prediction,
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
    text = {
        "ddim_jax": json.dumps({"model": model, **dataclasses.asdict(sampling), **source.given()})
    }
    save_png(out, grid(drawn, scale=scale), text=text, overwrite=overwrite)
    print(f"wrote {out}: {num_images} images, {sampling}")


@app.command
def generate(
    model: tyro.conf.Positional[str],
    sampling: SamplingOptions,
    source: SourceOptions,
    processes: ProcessOptions,
    out: pathlib.Path,
    num_images: int = 50_000,
    cycle_labels: bool = False,
    batch_size: int = 100,
    shard_size: int = 1000,
) -> None:
    """Draw many images, for evaluation, into a folder of .npy shards; called again, it goes on.

    Args:
      model: see `sample`.
      out: the folder.
      num_images: how many; image k is the same whatever the number of devices and processes.
      cycle_labels: for networks with classes, image k gets class k mod K.
      batch_size: images at a time on each device; divides shard_size.
      shard_size: images in a file.
    """
    from ddim_jax.generate import generate

    sampling.check()
    processes.join()
    generate(
        source.load(model),
        out,
        num_images,
        sampling.steps,
        sampling.eta,
        spacing=sampling.spacing,
        use_sigma_hat=sampling.sigma_hat,
        clip=sampling.clip,
        labels="cycle" if cycle_labels else None,
        seed=sampling.seed,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    print(f"{out}: {num_images} images, {sampling}")


@app.command
def info(model: tyro.conf.Positional[str], source: SourceOptions, verify: bool = False) -> None:
    """Say what a model or a run is: configuration, progress, checkpoints.

    Args:
      model: see `sample`.
      verify: read all checkpoints of a run, and compare each with its digest.
    """
    run = (pathlib.Path(model) / "checkpoints").is_dir() and source == Source()
    if verify and not run:
        more = "".join(f" --{name} {value}" for name, value in source.given().items())
        raise ValueError(f"--verify is for all checkpoints of a run folder, got {model}{more}")
    if run:
        from ddim_jax.summary import summarise

        print(describe(summarise(model, verify)))
    else:
        loaded = source.load(model)
        print(describe({**loaded.facts, "parameters": count_params(loaded.params)}))


@app.command
def export(
    model: tyro.conf.Positional[str],
    out: tyro.conf.Positional[pathlib.Path],
    source: SourceOptions,
    float16: bool = False,
    diffusers: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model as one .safetensors file, or as a folder that diffusers loads.

    Args:
      model: a run folder (its moving average is taken), or anything that `sample` takes.
      out: the file or folder to write.
      float16: halve the file; weights are rounded to 11 bits and read back as float32.
      diffusers: write a folder for `DDIMPipeline.from_pretrained`.
      overwrite: replace the file if it exists (never a folder).
    """
    if diffusers and float16:
        raise ValueError("--float16 is for a .safetensors file; a diffusers folder is float32")
    if out.exists() and (diffusers or not overwrite):
        raise FileExistsError(f"{out} exists; choose another, or pass --overwrite for a file")
    loaded = source.load(model)
    if diffusers:
        save_diffusers(out, loaded)
    else:
        save_model(out, loaded, float16=float16, overwrite=overwrite)
    print(f"wrote {out}: {count_params(loaded.params):,} parameters; ddim-jax sample {out}")


def describe(facts: dict[str, Any], indent: str = "") -> str:
    """Nested facts as indented lines, with commas in whole numbers."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", describe(value, indent + "  ")]
        else:
            shown = f"{value:,}" if type(value) is int else value
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(lines)


def main() -> None:
    """The console script: errors of use become a message and exit code 1, a stop by signal 75."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache / "ddim_jax"))
    first = set(sys.argv[1:2])
    if first & {*TRAINING, "-h", "--help"}:  # its imports take seconds
        try:
            from ddim_jax.cli_train import add_commands

            add_commands(app)
        except ModuleNotFoundError as error:
            if first & TRAINING:
                sys.exit(f"ddim-jax: error: {error}; {INSTALL}")
    try:
        app.cli(prog="ddim-jax", description=__doc__, config=(tyro.conf.CascadeSubcommandArgs,))
    except Preempted as stopped:
        print(f"ddim-jax: {stopped}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except ERRORS as error:
        if os.environ.get("DDIM_JAX_TRACEBACK"):
            raise
        hint = f"; {INSTALL}" if isinstance(error, ModuleNotFoundError) and error.name else ""
        message = f"ddim-jax: error: {error}{hint}\n(DDIM_JAX_TRACEBACK=1 shows where)"
        if jax.process_count() > 1:  # at once: the others wait for this one, and are told so
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)


if __name__ == "__main__":
    main()
