"""The experiments' command line: common options, their checks, and what a row or a number means."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ddim_jax.process import PREDICTIONS
from ddim_jax.sampling import METHODS, find_method
from ddim_jax.storage.files import portable
from ddim_jax.training.run_folder import Preempted

SIGMA_HAT = "hat"
HELP = {
    "steps": "S, the numbers of network calls per image",
    "eta": f"rows: η of Eq. 16, {SIGMA_HAT} for σ̂, or a method, see `ddim_jax.METHODS`",
    "num_images": "images in each cell; S=N sets one S apart, as in `500 1000=100`",
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
      A namespace, with `command`, the line that repeats it (of absolute paths the names alone).

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
            "--extractor",
            help="pixels, resnet56, inception:PATH; by default resnet56 for CIFAR-10, else pixels",
        )
    if "spacing" not in without:
        parser.add_argument(
            "--spacing", help="of τ; quadratic for CIFAR-10, else linear (App. D.2)"
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time")
    parser.add_argument("--seconds", type=int, help="begin no further batch after so long")
    parser.add_argument(
        "--or-not-run",
        action="store_true",
        help="where the data are not at hand, do what can be done without them, or say so and end",
    )
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
    args.command = shlex.join(["python", "-m", f"experiments.{name}", *map(portable, words)])
    return args


def _check(args: argparse.Namespace) -> None:
    """Before anything is written."""
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be in 0..2**32 - 1, got {args.seed}")
    for name, value in vars(args).items():
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if "eta" in args:
        args.eta = [f"{noise(row)['eta']:g}" if "eta" in noise(row) else row for row in args.eta]
    for name in ("eta", "steps"):
        values = getattr(args, name, [])
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must not name a value twice, got {values}")
    words = getattr(args, "num_images", [])
    named = [word.rpartition("=")[0] for word in words]
    strange = {s for s in named if s} - set(map(str, getattr(args, "steps", [])))
    if len(set(named)) < len(named) or strange:
        raise ValueError(
            f"--num-images takes one number, and S=N for S among --steps, got {' '.join(words)}"
        )


def run(main: Callable[[], Any]) -> None:
    """A script's last line: errors of use become one line and exit code 1, Ctrl-C 130.

    A training run that a signal stopped has saved, and exits with code 75.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache / "ddim_jax"))
    try:
        main()
    except Preempted as stopped:  # training, by SIGTERM or Ctrl-C
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        os._exit(75)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # an orderly end waits for what the devices compute
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        if os.environ.get("DDIM_JAX_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(DDIM_JAX_TRACEBACK=1 shows where)")


def noise(eta: str) -> dict[str, Any]:
    """Options of `generate` for a row: η, σ̂ with x̂_0 clipped as the authors do, or a method."""
    if eta == SIGMA_HAT:
        return {"method": "ddpm-large", "clip": True}
    if eta in METHODS or ":" in eta:
        find_method(eta)
        return {"method": eta}
    try:
        value = float(eta)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(
            f"--eta takes numbers in [0, 1], {SIGMA_HAT!r} and methods ({', '.join(METHODS)}, or "
            f"module:function), got {eta!r}"
        )
    return {"eta": value}


def row_label(eta: str) -> str:
    """ "η = 0.2", "σ̂"."""
    options = noise(eta)
    if eta == SIGMA_HAT:
        return "σ̂"
    return f"η = {options['eta']:g}" if "eta" in options else eta


def num_images(words: Sequence[str], steps: int) -> int:
    """Images in the cells of one S, from the words of --num-images."""
    try:
        pairs = {s: n for s, _, n in (w.rpartition("=") for w in words)}
        number = int(pairs.get(str(steps), pairs.get("", "0")))
    except ValueError:
        number = 0
    if number < 4:
        raise ValueError(
            f"--num-images takes a number N ≥ 4, and S=N for single S, got {list(words)} for "
            f"S = {steps}"
        )
    return number
