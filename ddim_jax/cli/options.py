"""Options that several commands share, and how facts are shown."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, Literal, TypeAlias

import tyro

from ddim_jax.process import ScheduleConfig
from ddim_jax.storage.files import portable
from ddim_jax.training import parallel
from ddim_jax.weights import Model, load_model


@dataclasses.dataclass(frozen=True)
class Source:
    """What the model's file does not say, or which of its contents is meant.

    Attributes:
      step: which checkpoint of a run folder, the latest by default.
      config: the network of a PyTorch checkpoint: cifar10, celeba64, lsun256 or a config.json.
      image_size: of a PyTorch checkpoint of another network, a side or height and width; its
        shapes tell the rest. Of a diffusers folder, in place of its own.
      schedule: of the noise, T = 1000, in place of what the file says; linear is the paper's.
      prediction: what the network predicts, in place of what the file says; noise if neither says.
      dtype: what the network computes in, in place of what the file says; on a CPU float32 is the
        faster one, on a GPU bfloat16.
      part: of a checkpoint with several networks, the name of one, such as ema.
      variant: of a diffusers folder, such as fp16.
      ignore: tensors beside the network's to leave out, such as logvar; * stands for anything.
      revision: of a model org/name on the Hub, a branch, tag or commit.
      subfolder: of a model on the Hub, the folder in its repository.
      filename: of a model on the Hub, the file, where there are several.
      flags: of a network of OpenAI's: a JSON file of their flags, the name of a model that they
        published, such as guided-imagenet64, or their command line, --flags="--image_size 64".
    """

    step: int | None = None
    config: str | None = None
    image_size: int | tuple[int, int] | None = None
    schedule: Literal["linear", "cosine"] | None = None
    prediction: Literal["eps", "x_0", "v", "edm"] | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    part: str | None = None
    variant: str | None = None
    ignore: tuple[str, ...] | None = None
    revision: str | None = None
    subfolder: str | None = None
    filename: str | None = None
    flags: str | None = None

    def given(self) -> dict[str, Any]:
        return {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }

    def words(self) -> list[str]:
        """The options that say all of this."""
        pairs = ([f"--{name.replace('_', '-')}", value] for name, value in self.given().items())
        flat = (
            v
            for option, value in pairs
            for v in (option, *(value if isinstance(value, tuple) else [value]))
        )
        return [portable(str(word)) for word in flat]

    def load(self, model: str) -> Model:
        given = self.given()
        if self.schedule:
            given["schedule"] = ScheduleConfig(self.schedule)
        return load_model(model, **given)


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
ProcessOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Processes]


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


def check_writable(path: pathlib.Path) -> None:
    """Raises OSError where no file or folder could be made at `path`, before long work."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission in {there}")
