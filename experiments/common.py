"""What the experiments share: a folder of finished cells, the draws and their scores.

results/table1/settings.json         all that determines the numbers
               cells/eta0-S10.json   one finished cell each: a killed run goes on from here
               samples/eta0-S10/     the images behind a cell, see `experiments.pipeline`
               reference.npz         statistics of the data
               result.json           every cell, with versions, device and command
               figure.png
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import Dataset
from ddim_jax.pictures import plots
from ddim_jax.storage.files import portable
from ddim_jax.training.presets import DataConfig
from experiments.arguments import num_images
from experiments.judging import Cell, Judge
from experiments.provenance import (
    data_config,
    device,
    digest,
    read_json,
    versions,
    write,
    write_json,
)
from experiments.stepping import Stepper, stepper

FORMAT = 1


@dataclasses.dataclass
class Experiment(Judge):
    """One experiment in one folder: its model, data and extractor, and the cells already done."""

    name: str
    args: argparse.Namespace

    @functools.cached_property
    def model(self) -> ddim.Model:
        """The network, what it predicts, and its schedule."""
        return self._loaded.model

    @property
    def _loaded(self) -> Stepper:
        a = self.args
        return stepper(a.model or "digits", a.config, a.schedule, a.prediction, a.dtype)

    @functools.cached_property
    def stepper(self) -> Stepper:
        """What draws with the model: that of the process, so that nothing is compiled twice."""
        return self._loaded if self.model is self._loaded.model else Stepper(self.model)

    @functools.cached_property
    def data_config(self) -> DataConfig:
        """What `--data` names, or what the model learned from."""
        return data_config(self.args.data, self.model.facts)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data, of the images' shape."""
        dataset = self.data_config.load(self.args.data_dir)
        if dataset.image_shape != self.model.image_shape:
            raise ValueError(
                f"{dataset.name} has images of {dataset.image_shape}, the model draws "
                f"{self.model.image_shape}; name its data with --data"
            )
        return dataset

    def without_data(self) -> Cell | None:
        """With --or-not-run, where nothing of the data is at hand: a `result.json` that says so."""
        if not self.args.or_not_run or self.at_hand or self.shipped:
            return None
        reason = f"{self.data_config.name}, its data, is not at hand"
        return not_run(self.name, self.args, reason)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Of the data."""
        return self.shipped.facts["data"] if self.shipped else dict(self.dataset.provenance)

    @functools.cached_property
    def against(self) -> str:
        """What samples are compared with, in words."""
        number = self.shipped.moments.size if self.shipped else len(self.dataset)
        ships = ", by the statistics that ship" if self.shipped else ""
        return f"{number:,} images of {self.provenance['name']}{ships}"

    @functools.cached_property
    def spacing(self) -> str:
        """Of τ: quadratic for CIFAR-10, else linear, unless said otherwise."""
        cifar10 = self.data_config.name.startswith("cifar10")
        return getattr(self.args, "spacing", None) or ("quadratic" if cifar10 else "linear")

    def tau(self, steps: int, spacing: str | None = None) -> np.ndarray:
        """(S,) timesteps; the authors' `quad` and `uniform` may give fewer or more."""
        schedule = self.model.schedule
        spacing = spacing or self.spacing
        return ddim.timesteps(schedule.num_steps, steps, spacing, schedule=schedule, exact=False)

    def num_images(self, steps: int) -> int:
        """Images in the cells of one S."""
        return num_images(self.args.num_images, steps)

    def begin(self, **more: Any) -> None:
        """Claims the folder, or finds that it is of these settings.

        Args:
          **more: further settings that determine the numbers, JSON-able.

        Raises:
          FileExistsError: the folder holds something else.
          ValueError: it holds this experiment with other settings; each is named.
        """
        ignored = {"out", "data_dir", "data", "extractor", "command", "full"}
        ignored |= {
            "seconds",
            "or_not_run",
            "model",
            "config",
            "schedule",
            "prediction",
            "dtype",
        }  # see the model's digest
        chosen = {k: v for k, v in vars(self.args).items() if k not in ignored}
        self.settings = json.loads(
            json.dumps(
                {"format": FORMAT, "experiment": self.name, **chosen, **more}
                | {"versions": {"ddim_jax": ddim.__version__, "jax": jax.__version__}}
            )
        )
        out, path = self.args.out, self.args.out / "settings.json"
        if path.exists():
            there = read_json(path)
            names = sorted(there.keys() | self.settings.keys())
            differ = [n for n in names if there.get(n) != self.settings.get(n)]
            if differ:
                lines = [f"  {n}: there {there.get(n)}, now {self.settings.get(n)}" for n in differ]
                raise ValueError(
                    "\n".join([f"{out} has other settings; choose another --out:", *lines])
                )
        elif out.exists() and any(
            p.suffix != ".tmp"
            and p.name != "reference.npz"  # of another experiment's data; checked when it is read
            and (p.name != "result.json" or is_run(out))
            for p in out.iterdir()
        ):
            raise FileExistsError(f"{out} holds something else; choose another --out")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, self.settings)

    def begin_with_model(self, *, data: bool = True, **more: Any) -> None:
        """`begin`, with the weights and, if asked, the data and the extractor as settings."""
        for steps in getattr(self.args, "steps", []):
            self.tau(steps)
        more |= {"model": digest(self.model), "spacing": self.spacing}
        if data:
            more |= {"data": self.provenance} | ({"reference": "ships"} if self.shipped else {})
        if data and "extractor" in self.args:
            more |= {"extractor": [self.extractor.name, self.extractor.digest]}
        self.begin(**more)

    def has(self, key: str) -> bool:
        """Whether that cell is finished."""
        return (self.args.out / "cells" / f"{key}.json").exists()

    def cell(self, key: str, compute: Callable[[], Cell]) -> Cell:
        """The finished cell of that name, or else the computed one, which is kept.

        Args:
          key: a file name.
          compute: () → JSON-able dict.

        Returns:
          The dict, with the seconds it took and the device it ran on.
        """
        path = self.args.out / "cells" / f"{key}.json"
        if self.has(key):
            return read_json(path)
        path.parent.mkdir(exist_ok=True)
        began = time.perf_counter()
        cell = compute()
        seconds = time.perf_counter() - began + cell.get("drawing_seconds", 0.0)
        cell |= {"seconds": seconds, "device": device()}
        write_json(path, cell)
        numbers = [f"{k} {v:.4g}" for k, v in cell.items() if isinstance(v, int | float)]
        print(f"{self.name} {key}: {', '.join([*numbers[:3], numbers[-1]])}", flush=True)
        return read_json(path)

    def finish(self, cells: Any, figure: Any, caption: str, **more: Any) -> Cell:
        """Writes `result.json` and `figure.png`.

        Args:
          cells: all numbers, JSON-able.
          figure: of matplotlib.
          caption: what the figure shows.
          **more: further entries.

        Returns:
          What was written.
        """
        facts = {}
        if "model" in self.settings:
            facts["model"] = {"source": portable(self.args.model or "digits"), **digest(self.model)}
        result = {
            "experiment": self.name,
            "status": "run",
            "settings": self.settings,
            **facts,
            "command": self.args.command,
            "device": device(),
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "caption": caption,
            "cells": cells,
            **more,
        }
        write(self.args.out / "figure.png", plots.png_bytes(figure))
        write_json(self.args.out / "result.json", result)
        print(f"wrote {self.args.out / 'result.json'} and figure.png", flush=True)
        return result


def sizes(counts: Mapping[int, int]) -> str:
    """S → number of images, in words: "300 each", or "300 at S = 10, 8 at S = 1000"."""
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} each"
    return ", ".join(f"{n:,} at S = {s}" for s, n in counts.items())


def not_run(name: str, args: argparse.Namespace, reason: str) -> Cell:
    """Writes a `result.json` that says so, unless the folder holds a result."""
    path = args.out / "result.json"
    if is_run(args.out) or (args.out / "settings.json").exists():
        raise FileExistsError(f"{args.out} holds a result; choose another --out, or say --model")
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"experiment": name, "status": "not run", "reason": reason, "command": args.command}
    write_json(path, result)
    print(f"{name}: not run: {reason}")
    return result


def is_run(folder: pathlib.Path) -> bool:
    """Whether the folder's result.json is one of a run."""
    path = folder / "result.json"
    return path.exists() and read_json(path).get("status") != "not run"
