"""What a page of benchmarks is made of: its races, and the environment of each side."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import ddim_jax as ddim
from ddim_jax.networks.paper import PAPER
from experiments.benchmarks import peers, tables, training
from experiments.benchmarks.peers import COMPILED, EAGER, LAST, NETWORK, OURS, REDUCED
from experiments.benchmarks.racing import Race

# By whether there is a GPU.
SIDES = {True: (OURS, LAST, COMPILED, REDUCED), False: (OURS, EAGER, LAST)}
FIRST = {True: ((128, 10), (1, 50)), False: ((8, 10),)}  # sampling: batch, S
MORE = {True: ((8, 10), (512, 10)), False: ()}
BATCHES = {True: (128, (512, 256)), False: (8, ())}  # of training, and ours alone


class Plan:
    """The races of each section.

    Args:
      args: of the command.
      work: a folder for what the sides share.
    """

    def __init__(self, args: argparse.Namespace, work: pathlib.Path):
        self.args, self.work = args, work
        self.config = peers.SMALL if args.small else PAPER["cifar10"]
        self.flops = peers.network_flops(self.config)
        self.folder = str(work / "model")
        ddim.save_diffusers(self.folder, peers.random_model(self.config))

    def env(self, side: str, cache: str = "cache") -> dict[str, str]:
        """The environment of a side; "ours, FLAGS" has these XLA_FLAGS."""
        ours = peers.is_ours(side)
        flags = side.partition(", ")[2] if ours else ""
        own = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
            "JAX_COMPILATION_CACHE_DIR": str(self.work / (cache + tables.slug(flags))),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / f"inductor-{cache}"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if not ours or not self.args.gpu:
            own["JAX_PLATFORMS"] = "cpu"
        return dict(os.environ) | own

    def races(self, section: str) -> list[Race]:
        """Of one section; none of a section that starts its processes itself."""
        args, gpu, sides = self.args, self.args.gpu, self.args.sides
        (first, later), variants = BATCHES[gpu], [OURS, *(f"{OURS}, {f}" for f in args.xla)]
        trained = [s for s in sides if s not in (NETWORK, EAGER)]  # theirs is channels last there
        if section == "limits":
            return [self._race("limits", [OURS, EAGER], figures=True)]
        if section == "fit":
            return [self._race("fit", [OURS], figures=True, settings=self.fit())]
        if section == "training":
            parts = [what for what in training.WORK if what != training.FORWARD or not gpu]
            return [self._race(what, trained, self._small(first)) for what in parts]
        if section == "more":
            alone = [self._race(training.STEP, [OURS], self._small(b)) for b in later]
            passes = [self._race(training.BACKWARD, [OURS], self._small(b)) for b in later]
            return alone + self._sampling(MORE[gpu], sides) + passes
        if section == "xla":
            races = self._sampling(FIRST[gpu], variants)
            return [dataclasses.replace(r, title=f"XLA's flags, {r.title}") for r in races]
        return self._sampling(FIRST[gpu], sides) if section == "sampling" else []

    def first_image(self) -> dict[str, Any]:
        """The specification of one image's drawing."""
        steps = FIRST[self.args.gpu][-1][1]
        return dict(self._race("sampling", [OURS], 1, self._small(steps)).specs[0])

    def fit(self) -> dict[str, Any]:
        """See `train_loop.Settings`."""
        if self.args.small:
            return {"steps": 10, "every": 5, "rounds": 1, "input_seconds": 0.1}
        if not self.args.gpu:
            return {}
        return {"preset": "cifar10", "batch_size": BATCHES[True][0], "dtype": self.args.dtype,
                "steps": 200, "every": 50, "rounds": 1, "input_seconds": 2.0,
                **self._data()}  # fmt: skip

    def train(self) -> list[str]:
        """The words of `ddim-jax train`."""
        if self.args.small or not self.args.gpu:
            return ["digits", "--train.log-every", "5"]
        options = {"data_dir": "--data-dir", "data": "--data.name"}
        data = [word for key, value in self._data().items() for word in (options[key], value)]
        return ["cifar10", "--model.dtype", self.args.dtype, "--train.log-every", "5", *data]

    def _data(self) -> dict[str, str]:
        """Where the images are."""
        if self.args.data_dir:
            return {"data_dir": self.args.data_dir}
        path = self.work / "images.npy"
        if not path.exists():
            np.save(path, np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8))
        return {"data": str(path)}

    def _sampling(self, sizes: Sequence[tuple[int, int]], sides: Sequence[str]) -> list[Race]:
        return [self._race("sampling", sides, self._small(b), self._small(s)) for b, s in sizes]

    def _small(self, size: int) -> int:
        """A batch or S, two at most to try the command."""
        return min(size, 2) if self.args.small else size

    def _race(
        self, what: str, sides: Sequence[str], batch: int = 0, steps: int = 0, **more: Any
    ) -> Race:
        """Of one table."""
        figures = more.get("figures", False)
        title = what + (f", batch {batch}" if batch else "") + (f", S = {steps}" if steps else "")
        spec: Mapping[str, Any] = {
            "what": what, "batch": batch, "steps": steps, "folder": self.folder,
            "dtype": self.args.dtype, "small": self.args.small,
            "repeats": 3 if what in training.WORK and self.args.gpu else 1, **more,
        }  # fmt: skip
        env = {side: self.env(side) for side in sides}
        specs = [{**spec, "side": side} for side in sides]
        return Race(title, specs, env, 1 if figures else self.args.rounds)
