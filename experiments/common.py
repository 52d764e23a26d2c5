"""What the experiments share: arguments, a folder of finished cells, the draws and their scores.

results/table1/settings.json         all that determines the numbers
               cells/eta0-S10.json   one finished cell each: a killed run goes on from here
               samples/eta0-S10/     the images behind a cell, see `ddim_jax.generate`
               reference.npz         statistics of the data
               result.json           every cell, with versions, device and command
               figure.png
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax import plots
from ddim_jax.data import Dataset
from ddim_jax.evaluation import (
    Extractor,
    Reference,
    evaluate,
    extractors,
    frechet_jackknife,
    moments,
    reference_statistics,
)
from ddim_jax.generate import generate, iter_shards
from ddim_jax.presets import DataConfig
from ddim_jax.process import PREDICTIONS
from ddim_jax.schedule import ScheduleConfig
from ddim_jax.unet import make_apply
from experiments.provenance import (
    data_config,
    device,
    digest,
    read_json,
    versions,
    write,
    write_json,
)

FORMAT = 1
SIGMA_HAT = "hat"
Cell = dict[str, Any]
HELP = {
    "steps": "S, the numbers of network calls per image",
    "eta": f"rows: η of Eq. 16, or {SIGMA_HAT} for σ̂",
    "num_samples": "images in each cell; S=N sets one S apart, as in `500 1000=100`",
    "clip": "clip x̂_0 to [−1, 1] in every row (σ̂'s always is): helps networks trained briefly",
}


def parse(
    name: str,
    description: str,
    argv: Sequence[str] | None,
    small: Mapping[str, Any],
    full: Mapping[str, Any] | None = None,
    *,
    without: Sequence[str] = (),
    **extra: Any,
) -> argparse.Namespace:
    """Arguments of one experiment: the common ones, and one for each entry of `small`.

    Args:
      name: of the experiment, `results/NAME` by default.
      description: the first line of the help.
      argv: words of the command line; those of this process by default.
      small: option → default; a list takes several values of its first one's type, False is a flag.
      full: defaults under `--full`, the paper's sizes, where they differ.
      without: which of --extractor and --spacing it has no use for.
      **extra: option → its line of help, where `HELP` has none.

    Returns:
      A namespace, with `command`, the line that repeats it.

    Raises:
      ValueError: a number is out of range, or a row or column is asked for twice.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=description)
    parser.add_argument("--model", help='"digits" (ships), or what `ddim_jax.load_model` takes')
    parser.add_argument("--config", help="a network of the paper, for a checkpoint without one")
    parser.add_argument("--schedule", choices=("linear", "cosine"), help="in place of the file's")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="in place of the file's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="the network computes in")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results") / name)
    parser.add_argument("--data", help="the data to compare with; by default the model's own")
    parser.add_argument("--data-dir", help="where TFDS data lie; by default $DDIM_JAX_DATA")
    if "extractor" not in without:
        parser.add_argument(
            "--extractor", default="pixels", help="pixels, resnet56:PATH, inception:PATH"
        )
    if "spacing" not in without:
        parser.add_argument(
            "--spacing", help="of τ; quadratic for CIFAR-10, else linear (App. D.2)"
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time")
    parser.add_argument("--full", action="store_true", help="the paper's sizes as defaults")
    full = {**small, **(full or {})}
    for option, default in small.items():
        if default is False:
            flag = "--" + option.replace("_", "-")
            parser.add_argument(flag, action="store_true", help={**HELP, **extra}[option])
            continue
        parser.add_argument(
            "--" + option.replace("_", "-"),
            type=type(default[0] if isinstance(default, list) else default),
            nargs="+" if isinstance(default, list) else None,
            help=f"{({**HELP, **extra})[option]} (default {default}, --full {full[option]})",
        )
    args = parser.parse_args(words)
    for option, default in (full if args.full else small).items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    _check(args)
    args.command = shlex.join(["python", "-m", f"experiments.{name}", *words])
    return args


def _check(args: argparse.Namespace) -> None:
    """Before anything is written."""
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be in 0..2**32 - 1, got {args.seed}")
    for name, value in vars(args).items():
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if "eta" in args:
        args.eta = [eta if eta == SIGMA_HAT else f"{noise(eta)['eta']:g}" for eta in args.eta]
    for name in ("eta", "steps"):
        values = getattr(args, name, [])
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must not name a value twice, got {values}")
    words = getattr(args, "num_samples", [])
    named = [word.rpartition("=")[0] for word in words]
    strange = {s for s in named if s} - set(map(str, getattr(args, "steps", [])))
    if len(set(named)) < len(named) or strange:
        raise ValueError(
            f"--num-samples takes one number, and S=N for S among --steps, got {' '.join(words)}"
        )


def run(main: Callable[[], Any]) -> None:
    """A script's last line: errors of use become one line and exit code 1."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache / "ddim_jax"))
    try:
        main()
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        if os.environ.get("DDIM_JAX_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(DDIM_JAX_TRACEBACK=1 shows where)")


@dataclasses.dataclass
class Experiment:
    """One experiment in one folder: its model, data and extractor, and the cells already done."""

    name: str
    args: argparse.Namespace

    @functools.cached_property
    def model(self) -> ddim.Model:
        """The network, what it predicts, and its schedule."""
        args = self.args
        schedule = args.schedule and ScheduleConfig(args.schedule)
        model = ddim.load_model(args.model or "digits", config=args.config, schedule=schedule,
                                prediction=args.prediction)  # fmt: skip
        if args.dtype in (None, model.config.dtype):
            return model
        config = dataclasses.replace(model.config, dtype=args.dtype)
        return model._replace(config=config, apply_fn=make_apply(config))

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

    @functools.cached_property
    def extractor(self) -> Extractor:
        """What `--extractor` names."""
        name, _, path = self.args.extractor.partition(":")
        if name == "pixels" and not path:
            return extractors.pixels()
        if name in ("resnet56", "inception") and path:
            return getattr(extractors, name)(path)
        raise ValueError(
            f"--extractor must be pixels, resnet56:PATH or inception:PATH, got "
            f"{self.args.extractor!r}"
        )

    @functools.cached_property
    def reference(self) -> Reference:
        """Statistics of the data, computed once for the folder."""
        return reference_statistics(self.args.out / "reference.npz", self.dataset, self.extractor)

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

    def num_samples(self, steps: int) -> int:
        """Images in the cells of one S."""
        return _num_samples(self.args.num_samples, steps)

    def begin(self, **more: Any) -> None:
        """Claims the folder, or finds that it is of these settings.

        Args:
          **more: further settings that determine the numbers, JSON-able.

        Raises:
          FileExistsError: the folder holds something else.
          ValueError: it holds this experiment with other settings; each is named.
        """
        ignored = {"out", "data_dir", "data", "extractor", "command", "full"}
        ignored |= {"model", "config", "schedule", "prediction", "dtype"}  # see the model's digest
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
            p.suffix != ".tmp" and (p.name != "result.json" or is_run(out)) for p in out.iterdir()
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
            more |= {"data": self.dataset.provenance}
        if data and "extractor" in self.args:
            more |= {"extractor": [self.extractor.name, self.extractor.digest]}
        self.begin(**more)

    def cell(self, key: str, compute: Callable[[], Cell]) -> Cell:
        """The finished cell of that name, or else the computed one, which is kept.

        Args:
          key: a file name.
          compute: () → JSON-able dict.

        Returns:
          The dict, with the seconds it took and the device it ran on.
        """
        path = self.args.out / "cells" / f"{key}.json"
        if path.exists():
            return read_json(path)
        path.parent.mkdir(exist_ok=True)
        began = time.perf_counter()
        cell = compute()
        cell |= {"seconds": time.perf_counter() - began, "device": device()}
        write_json(path, cell)
        numbers = [f"{k} {v:.4g}" for k, v in cell.items() if isinstance(v, int | float)]
        print(f"{self.name} {key}: {', '.join([*numbers[:3], numbers[-1]])}", flush=True)
        return read_json(path)

    def draw(self, eta: str, steps: int, spacing: str | None = None) -> pathlib.Path:
        """A folder of images, image k from the same x_T in every cell; resumes."""
        number, spacing = self.num_samples(steps), spacing or self.spacing
        batch = min(self.args.batch_size, number)
        return generate(
            self.model,
            self.args.out / "samples" / f"eta{eta}-S{steps}-{spacing}",
            number,
            self.tau(steps, spacing),
            seed=self.args.seed,
            batch_size=batch,
            shard_size=batch * max(1, 1000 // batch),
            progress=False,
            **{"clip": getattr(self.args, "clip", False)} | noise(eta),
        )

    def drawn(self, eta: str, steps: int, spacing: str | None = None) -> np.ndarray:
        """The images of `draw`, uint8 (n, H, W, C)."""
        return np.concatenate(list(iter_shards(self.draw(eta, steps, spacing))))

    def score(self, images: Any) -> Cell:
        """Figures of uint8 images against the data: FD with its standard error, KD, precision.

        Args:
          images: uint8 (n, H, W, C), or a list of such shards.

        Returns:
          {"name", "distance", "se", "kernel", "precision", "recall", "num_samples"}.
        """
        number = sum(map(len, images)) if isinstance(images, list) else len(images)
        blocks = jackknife_blocks(number)
        found = evaluate(images, self.reference, self.extractor, blocks=blocks)
        return {
            "name": found.frechet.name,
            "distance": found.frechet.value,
            "se": found.frechet.se,
            "kernel_name": found.kernel.name,
            "kernel": found.kernel.value,
            "kernel_se": found.kernel.se,
            "precision": found.precision.value,
            "recall": found.recall.value,
            "num_samples": found.size,
            "blocks": blocks,
        }

    def floor(self, number: int) -> Cell:
        """What real images score at `number`, on which the distance depends.

        Half against half: min(number, N/2) random images of the odd-numbered half of the data,
        against all of the even-numbered one.
        """

        def compute() -> Cell:
            from ddim_jax.evaluation import features

            rng = np.random.default_rng(self.args.seed)
            even, odd = np.arange(0, len(self.dataset), 2), np.arange(1, len(self.dataset), 2)
            some = rng.permutation(odd)[:number]
            x, y = (
                np.concatenate(list(features(self.extractor, self.dataset.take(half)["image"])))
                for half in (some, even)
            )
            value, se = frechet_jackknife(x, moments(y), jackknife_blocks(len(x)))
            name = self.extractor.frechet_name
            return {"name": name, "distance": value, "se": se, "num_samples": len(x)}

        return self.cell(f"floor-n{number}", compute)

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
            facts["model"] = {"source": self.args.model or "digits", **digest(self.model)}
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


def noise(eta: str) -> dict[str, Any]:
    """Options of `generate` for one row: η, or σ̂ with x̂_0 clipped as in the authors' code."""
    if eta == SIGMA_HAT:
        return {"eta": 1.0, "use_sigma_hat": True, "clip": True}
    try:
        value = float(eta)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"--eta takes numbers in [0, 1] and {SIGMA_HAT!r}, got {eta!r}")
    return {"eta": value}


def row_label(eta: str) -> str:
    """ "η = 0.2", "σ̂"."""
    value = noise(eta)["eta"]
    return "σ̂" if eta == SIGMA_HAT else f"η = {value:g}"


def sizes(counts: Mapping[int, int]) -> str:
    """S → number of images, in words: "300 each", or "300 at S = 10, 8 at S = 1000"."""
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} each"
    return ", ".join(f"{n:,} at S = {s}" for s, n in counts.items())


def jackknife_blocks(number: int) -> int:
    """20 where there are enough samples."""
    return max(2, min(20, number // 2))


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


def _num_samples(words: Sequence[str], steps: int) -> int:
    try:
        pairs = {s: n for s, _, n in (w.rpartition("=") for w in words)}
        number = int(pairs.get(str(steps), pairs.get("", "0")))
    except ValueError:
        number = 0
    if number < 4:
        raise ValueError(
            f"--num-samples takes a number N ≥ 4, and S=N for single S, got {list(words)} for "
            f"S = {steps}"
        )
    return number
