"""One page of figures: our sampling and training beside diffusers' in PyTorch, in one run.

    python -m experiments.benchmarks.page [--seconds 540] [--only sampling training] [--json FILE]

The same U-Net, weights and batch on all sides, medians of rounds in turns with the extremes; "time
/ ours" is the median over the rounds of a side's time / ours (above 1: ours is faster). Sections
come in the order of `SECTIONS`, or of --only, each printed when it is done; what `--seconds` does
not allow is named. `racing` says how it is timed, `peers` what is counted. Memory is a process's
own: on a GPU its allocator's peak, compiling and its trials included; on a CPU the peak resident
size, and by how much weights and work raised it above the imports. XLA's flags begin with dashes:
`--xla="--xla_gpu_graph_min_graph_size=1"`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax

from ddim_jax.storage.files import portable
from experiments.benchmarks import aims, peers, starting, tables
from experiments.benchmarks.peers import COMPILED, EAGER, LAST, NETWORK, OURS, REDUCED
from experiments.benchmarks.plan import SIDES, Plan
from experiments.benchmarks.racing import Course, Race
from experiments.provenance import read_json, versions, write_json

SECTIONS = ("limits", "sampling", "training", "fit", "first-step", "first-image", "profile",
            "more", "xla")  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("gpu", "cpu"), help="by default, what is here")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="that it may take")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    every = (OURS, NETWORK, EAGER, LAST, COMPILED, REDUCED)
    parser.add_argument("--sides", nargs="+", choices=every)
    parser.add_argument("--rounds", type=int, help="7 on a GPU, else 4")
    parser.add_argument("--parallel", type=int, help="processes that get ready at a time")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a side")
    parser.add_argument("--xla", action="append", default=[], metavar="FLAGS",
                        help="sample with these XLA_FLAGS too; may be repeated")  # fmt: skip
    parser.add_argument("--data-dir", help="of CIFAR-10; else as many random images")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the command")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this new file too")
    args = parser.parse_args(argv)
    args.gpu = (args.backend or ("gpu" if shutil.which("nvidia-smi") else "cpu")) == "gpu"
    args.dtype = args.dtype or ("bfloat16" if args.gpu else "float32")
    args.rounds = args.rounds or (7 if args.gpu else 4)
    args.parallel = args.parallel or (max(1, (os.cpu_count() or 1) * 3 // 4) if args.gpu else 1)
    args.sides = args.sides or list(SIDES[args.gpu])
    if least := [n for n in ("rounds", "parallel") if getattr(args, n) < 1]:
        parser.error(f"--{least[0]} must be at least 1")
    if OURS not in args.sides:
        parser.error(f"--sides needs {OURS!r}, which all others are compared with")
    if args.json and args.json.exists():
        parser.error(f"{args.json} exists; choose another --json")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"there is no folder {args.json.parent} for --json; make it first")
    if args.data_dir and not pathlib.Path(args.data_dir).is_dir():
        parser.error(f"there is no folder {args.data_dir} for --data-dir")
    return args


class Page:
    """The sections one after the other, and what has been found."""

    def __init__(self, args: argparse.Namespace, work: pathlib.Path):
        self.args, self.work, self.deadline = args, work, time.time() + args.seconds
        self.plan = Plan(args, work)
        self.found: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "experiments.benchmarks.page",
                                   *map(portable, sys.argv[1:])]),
            "machine": {"versions": versions("flax", "torch", "diffusers"),
                        "load": os.getloadavg()[0], "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
            "settings": {"model": self.plan.config.facts(), "dtype": args.dtype,
                         "rounds": args.rounds, "flops_per_image_and_call": self.plan.flops},
            "sections": {}, "not run": {},
        }  # fmt: skip

    def run(self) -> None:
        """Section after section; those of races together, so that their sides get ready at once."""
        chosen = [s for s in self.args.only if s != "xla" or self.args.xla]
        planned = {section: self.plan.races(section) for section in chosen}
        while chosen:
            together = []
            while chosen and planned[chosen[0]]:
                together += planned[chosen.pop(0)]
            if together:
                self.run_races(together)
            else:
                self.run_alone(chosen.pop(0))

    def run_races(self, races: list[Race]) -> None:
        """Each prints a table."""
        course = Course(races, self.work, self.args.parallel, self.args.patience)
        try:
            for race in races:
                if self.left() < 15:
                    self.skip(race.title, "no time was left")
                    continue
                self.attempt(race.title, lambda race=race: tables.of_race(
                    race, course.run(race, self.deadline), self.found, self.plan.flops
                ))  # fmt: skip
        finally:
            course.close()

    def run_alone(self, section: str) -> None:
        """What starts processes of its own."""
        if self.left() < 30:
            self.skip(section, "no time was left")
            return
        parts = {"first-step": self.first_step, "first-image": self.first_image,
                 "profile": self.profile}  # fmt: skip
        self.attempt(section, parts[section])

    def first_step(self) -> dict[str, Any]:
        """`train` with a cache that is empty, then with what it left there."""
        words, env = self.plan.train(), self.plan.env(OURS, "started")
        found = {
            name: starting.first_step(self.work / f"run-{name}", words, env, self.deadline)
            for name in ("cold", "warm")
        }
        shown = shlex.join(["ddim-jax", "train", *words]).replace(str(self.work), "FOLDER")
        shown = shown.replace(self.args.data_dir or "\0", "DIR")
        text = tables.starts(f"`{shown}` to its first five updates", found)
        return {"text": text, "command": shown, **found}

    def first_image(self) -> dict[str, Any]:
        """Of a single one."""
        spec, found = self.plan.first_image(), {}
        theirs = [s for s in self.args.sides if not peers.is_ours(s) and s not in peers.MODES]
        for side, cache in [(OURS, "cold"), (OURS, "warm"), *((s, "cold") for s in theirs)]:
            found[f"{side}, {cache}"] = starting.first_image(
                self.work, spec | {"side": side}, self.plan.env(side, "first"), self.deadline
            )
        title = f"from a process's start to its first image, S = {spec['steps']}"
        return {"text": tables.starts(title, found), **found}

    def profile(self) -> dict[str, Any]:
        """Of `benchmarks.profile`."""
        if not self.args.gpu:
            return {"text": "profile: not run, as there is no GPU"}
        command = [sys.executable, "-m", "experiments.benchmarks.profile", "--rounds", "3"]
        log, figures = self.work / "profile.md", self.work / "profile.json"
        command += ["--json", str(figures)]
        command += ["--preset", "digits", "--batch", "2"] if self.args.small else []
        errors, limit = self.work / "profile.log", max(1.0, self.left())
        with log.open("w") as out, errors.open("w") as err, suppress(subprocess.TimeoutExpired):
            env = self.plan.env(OURS)
            subprocess.run(command, check=False, stdout=out, stderr=err, env=env, timeout=limit)
        known = read_json(figures) if figures.exists() else {}
        said = errors.read_text().strip().splitlines()
        why = (
            "" if known else f"\nprofile: not finished: {said[-1] if said else 'no time was left'}"
        )
        return {"text": log.read_text().strip() + why, **known}

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def skip(self, title: str, why: str) -> None:
        """Names what was not measured."""
        self.found["not run"][title] = why
        self.write(f"\n{title}: not run: {why}")

    def attempt(self, title: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Prints and writes what it finds; its failure leaves the other sections be."""
        try:
            found = measure()
        except Exception as error:
            self.skip(title, repr(error)[:500])
            return
        self.found["sections"][title] = dict(found)
        spent = self.args.seconds - self.left()
        self.write(f"\n{found['text']}\n\n<!-- {title}: {spent:.0f} s -->")

    def write(self, text: str) -> None:
        """The text to stdout, and all figures to the file."""
        print(text, flush=True)
        if self.args.json:
            write_json(self.args.json, self.found)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; with --json writes."""
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")  # this process leaves the GPU to the sides
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Page(args, pathlib.Path(folder))
        said = ", ".join(f"{k} {v}" for k, v in page.found["machine"]["versions"].items())
        print(f"# Benchmarks, {args.dtype}\n\n{page.found['command']}\n\n{said}", flush=True)
        page.run()
        if args.gpu:
            print(f"\n{aims.summary(page.found['sections'])}")
        print(f"\n{page.found['machine'].get('kind', 'no device was seen')}, {args.dtype}"
              + ("" if args.gpu else "; not run on a GPU"), flush=True)  # fmt: skip


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what was started ends with it
    main()
