"""`ddim-jax export`."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from typing import Literal, TypeAlias

import tyro

from ddim_jax.cli.options import SourceOptions, check_writable
from ddim_jax.cli.ways import Sampling, Way
from ddim_jax.generation.artifact import SUFFIX, export_sampler
from ddim_jax.networks.unet import count_params
from ddim_jax.weights import Model, hub, save_diffusers, save_model
from ddim_jax.weights.model import SAYING_HOW


@dataclasses.dataclass(frozen=True)
class Program(Way):
    """Of a whole sampler, `out.stablehlo`.

    Attributes:
      from_seed: it takes a seed and the images' numbers in place of x_T.
      guidance: of a model with classes, it takes a scale too, at a second network call.
      beside: the weights stand in a file of their own, out.safetensors, and are an argument.
      bfloat16: weights and the network's activations.
      platforms: what it runs on: cpu, cuda, rocm, tpu.
    """

    from_seed: bool = False
    guidance: bool = True
    beside: bool = False
    bfloat16: bool = False
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")

    @property
    def sampling(self) -> Sampling:
        names = [field.name for field in dataclasses.fields(Way)]
        return Sampling(**{name: getattr(self, name) for name in names})


ProgramOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Program]


def export(
    model: tyro.conf.Positional[str],
    out: tyro.conf.Positional[pathlib.Path],
    source: SourceOptions,
    program: ProgramOptions,
    float16: bool = False,
    diffusers: bool = False,
    overwrite: bool = False,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write a model as a .safetensors file or a diffusers folder, or a sampler as .stablehlo.

    A network trained in bfloat16 says so, and draws in it everywhere; --dtype float32 makes it say
    that instead, which is faster on a CPU. It changes no weights.

    Args:
      model: a run folder (its moving average is taken), or anything that `sample` takes.
      out: the file or folder to write; m.stablehlo is a whole sampler that runs with JAX alone.
      float16: halve the weights; they are rounded to 11 bits and read back as float32.
      diffusers: write a folder for `DDIMPipeline.from_pretrained`.
      overwrite: replace the file if it exists (never a folder); with --push, files on the Hub.
      push: put it on the Hugging Face Hub too, as org/name, which must be new or empty.
      private: of a new repository there, which others then do not see.
    """
    whole = out.suffix == SUFFIX and not diffusers
    if diffusers and float16:
        raise ValueError("--float16 is for a file; a diffusers folder is float32")
    if diffusers and source.dtype is not None:
        raise ValueError("--dtype is for a file; a diffusers folder does not say it")
    if not whole and not diffusers and out.suffix != ".safetensors":
        raise ValueError(
            f"a model is written as one .safetensors file, or with --diffusers as a folder; got "
            f"{out}: name it {out.with_suffix('.safetensors')}, or {out.with_suffix(SUFFIX)} for a "
            "whole sampler"
        )
    if not whole and program != Program():
        raise ValueError(f"how to sample is for a whole sampler, {out.with_suffix(SUFFIX)}")
    if whole:
        if push is not None:
            raise ValueError("--push is for a model, not for a whole sampler")
        program.sampling.check()
        if float16 and program.bfloat16:
            raise ValueError("give --float16 or --bfloat16, not both")
        if program.bfloat16 and source.dtype == "float32":
            raise ValueError("--bfloat16 computes in it: leave out --dtype float32")
    files = [out, out.with_suffix(".json")] if whole else [out]
    if whole and program.beside:
        files += [weights := out.with_suffix(".safetensors")]
        if weights.resolve() == pathlib.Path(model).resolve():
            raise ValueError(
                f"--beside would write over {weights}, the model itself: name {out.name} otherwise"
            )
    for file in files:
        if file.exists() and (diffusers or not overwrite):
            raise FileExistsError(f"{file} exists; choose another, or pass --overwrite for a file")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} for {out.name}; make it first")
    check_writable(out)
    if private and push is None:
        raise ValueError("--private is for --push")
    if push is not None:
        hub.check_push(
            push, ["model_index.json"] if diffusers else [f.name for f in files], overwrite
        )
    loaded = source.load(model)
    if whole:
        sampling = program.sampling.of(loaded)
        if loaded.facts.keys() & SAYING_HOW:
            print(
                f"drawn by {program.method}, and not as {model} says itself: sample and generate "
                "do that, by --as-stored"
            )
        _write_sampler(loaded, out, program, sampling, float16, overwrite)
        return
    if diffusers:
        save_diffusers(out, loaded)
    else:
        save_model(out, loaded, float16=float16, overwrite=overwrite)
    draw = shlex.join(["ddim-jax", "sample", str(out)])
    print(f"wrote {out}: {count_params(loaded.params):,} parameters; {draw}")
    if push is not None:
        print(f"{hub.push(out, push, private)}: {shlex.join(['ddim-jax', 'sample', push])}")


def _write_sampler(
    model: Model,
    out: pathlib.Path,
    program: Program,
    sampling: Sampling,
    float16: bool,
    overwrite: bool,
) -> None:
    facts = export_sampler(
        model,
        sampling.timesteps(model.schedule),
        out,
        program.eta,
        method=program.method,
        clip=program.clip,
        start="seed" if program.from_seed else "noise",
        guidance=program.guidance,
        weights="beside" if program.beside else "inside",
        dtype="bfloat16" if program.bfloat16 else "float16" if float16 else "float32",
        platforms=program.platforms,
        overwrite=overwrite,
    )
    inputs = ", ".join(
        f"{value['name']} {value['dtype']}({', '.join(map(str, value['shape']))})"
        for value in facts["inputs"]
    )
    print(
        f"wrote {out} and {out.with_suffix('.json').name}: S = {len(facts['sampling']['tau'])}, "
        f"{out.stat().st_size / 1e6:.1f} MB, for {', '.join(facts['platforms'])}; it takes "
        f"{'the weights, ' if program.beside else ''}{inputs}"
    )
