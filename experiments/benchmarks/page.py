"""One page of figures: our sampling and training beside diffusers' in PyTorch, in one run.

    python -m experiments.benchmarks.page [--seconds 540] [--only sampling training] [--json FILE]

The same U-Net, weights and batch on all sides, medians of rounds in turns with the extremes; "time /
ours" is the median over the rounds of a side's time / ours (above 1: ours is faster). Sections come
in the order of `SECTIONS`, each printed when it is done; what `--seconds` does not allow is named.
`racing` says how it is timed, `peers` what is counted. Memory is a process's own: on a GPU its
allocator's peak, compiling and its trials included; on a CPU the peak resident size, and by how much
weights and work raised it above the imports.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

ASKED = os.environ.get("JAX_PLATFORMS")  # of the sides; this process leaves the GPU to them
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np  # noqa: E402

import ddim_jax as ddim  # noqa: E402
from ddim_jax.networks.paper import PAPER  # noqa: E402
from experiments.benchmarks import peers, starting, tables, training  # noqa: E402
from experiments.benchmarks.peers import COMPILED, EAGER, LAST, NETWORK, OURS, REDUCED  # noqa: E402
from experiments.benchmarks.racing import Course, Race  # noqa: E402
from experiments.provenance import versions, write_json  # noqa: E402

SECTIONS = ("limits", "sampling", "training", "fit", "first-step", "first-image", "more", "xla",
            "profile")  # fmt: skip
SIDES = {True: (OURS, LAST, COMPILED, REDUCED), False: (OURS, EAGER, LAST)}  # on a GPU or not
FIRST = {True: [(128, 10), (1, 50)], False: [(8, 10)]}  # sampling: batch, S
MORE = {True: [(8, 10), (512, 10)], False: []}
BATCHES = {True: (128, [256, 512]), False: (8, [])}  # of training, and ours alone


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("gpu", "cpu"), help="gpu where nvidia-smi is found")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="begin nothing more after that"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--sides", nargs="+", choices=(OURS, NETWORK, EAGER, LAST, COMPILED, REDUCED)
    )
    parser.add_argument("--rounds", type=int, help="10 on a GPU, else 4")
    parser.add_argument("--parallel", type=int, help="processes that get ready at a time")
    parser.add_argument("--patience", type=float, default=200.0, help="seconds to wait for a side")
    parser.add_argument("--xla", action="append", default=[], metavar="FLAGS",
                        help="sample with these XLA_FLAGS too; give it again for others")  # fmt: skip
    parser.add_argument("--data-dir", help="of CIFAR-10; else as many random images")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the command")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this new file too")
    args = parser.parse_args(argv)
    args.gpu = (args.backend or ("gpu" if shutil.which("nvidia-smi") else "cpu")) == "gpu"
    args.dtype = args.dtype or ("bfloat16" if args.gpu else "float32")
    args.rounds = args.rounds or (10 if args.gpu else 4)
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
    """The sections, what they share, and what has been found."""

    def __init__(self, args: argparse.Namespace, work: pathlib.Path):
        self.args, self.work, self.deadline = args, work, time.time() + args.seconds
        self.config = peers.SMALL if args.small else PAPER["cifar10"]
        self.flops = peers.network_flops(self.config)
        self.folder = str(work / "model")
        ddim.save_diffusers(self.folder, peers.random_model(self.config))
        words = shlex.join(["python", "-m", "experiments.benchmarks.page", *sys.argv[1:]])
        self.found: dict[str, Any] = {
            "command": words,
            "machine": {"versions": versions("flax", "torch", "diffusers"),
                        "load": os.getloadavg()[0], "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
            "settings": {"model": self.config.facts(), "dtype": args.dtype, "rounds": args.rounds,
                         "flops_per_image_and_call": self.flops},
            "sections": {}, "not run": {},
        }  # fmt: skip
        self.course: Course | None = None

    def env(self, side: str, cache: str = "cache") -> dict[str, str]:
        """The environment of a side; "ours, FLAGS" has these XLA_FLAGS."""
        flags = side.partition(", ")[2] if peers.is_ours(side) else ""
        own = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
            "JAX_COMPILATION_CACHE_DIR": str(self.work / (cache + tables.slug(flags))),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
            "PYTHONUNBUFFERED": "1",
        }
        if not peers.is_ours(side):
            own["JAX_PLATFORMS"] = "cpu"
        elif ASKED or not self.args.gpu:
            own["JAX_PLATFORMS"] = ASKED or "cpu"
        kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        return kept | own

    def race(
        self, what: str, batch: int, sides: Sequence[str], steps: int = 0, **more: Any
    ) -> Race:
        """Of one table."""
        title = f"{what}, batch {batch}" + (f", S = {steps}" if steps else "")
        timed = what in training.WORK
        spec = {"what": what, "batch": batch, "steps": steps, "folder": self.folder,
                "dtype": self.args.dtype, "small": self.args.small,
                "repeats": 5 if timed and self.args.gpu else 1, **more}  # fmt: skip
        specs = [spec | {"side": side} for side in sides]
        rounds = 1 if more.get("figures") else self.args.rounds
        title = what if more.get("figures") else title
        return Race(title, specs, {side: self.env(side) for side in sides}, rounds)

    def races(self, section: str) -> list[Race]:
        """Of one section."""
        args, gpu, sides = self.args, self.args.gpu, self.args.sides
        fit = [] if section != "fit" else [self.race("fit", 0, [OURS], figures=True,
                                                     settings=self.fit_settings())]  # fmt: skip
        first, later = BATCHES[gpu]
        plain = [s for s in sides if s not in (NETWORK, EAGER) or (s == EAGER and not gpu)]
        plain = [s for s in plain if gpu or s != LAST]
        variants = [OURS, *(f"{OURS}, {flags}" for flags in args.xla)]
        return {
            "limits": [self.race("limits", 0, [OURS, EAGER], figures=True)],
            "sampling": [self.race("sampling", b, sides, s) for b, s in self.sizes(FIRST[gpu])],
            "training": [self.race(what, self.batch(first), plain)
                         for what in training.WORK if what != training.FORWARD or not gpu],
            "fit": fit,
            "more": [self.race("sampling", b, sides, s) for b, s in self.sizes(MORE[gpu])]
            + [self.race(what, b, [OURS]) for b in later
               for what in (training.STEP, training.BACKWARD)],
            "xla": [self.race("sampling", b, variants, s) for b, s in self.sizes(FIRST[gpu])
                    if args.xla],
        }.get(section, [])  # fmt: skip

    def sizes(self, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Batch and S, two of each to try the command."""
        return [(min(b, 2), min(s, 2)) for b, s in sizes] if self.args.small else sizes

    def batch(self, size: int) -> int:
        """Of training."""
        return min(size, 2) if self.args.small else size

    def fit_settings(self) -> dict[str, Any]:
        """See `train_loop.Settings`."""
        if self.args.small or not self.args.gpu:
            return {"rounds": 1, "input_seconds": 1.0}
        return {"preset": "cifar10", "batch_size": BATCHES[True][0], "dtype": self.args.dtype,
                "steps": 300, "every": 100, "rounds": 1, "input_seconds": 2.0,
                **self.data()}  # fmt: skip

    def data(self) -> dict[str, str]:
        """Where the images are."""
        if self.args.data_dir:
            return {"data_dir": self.args.data_dir}
        path = self.work / "images.npy"
        if not path.exists():
            np.save(path, np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8))
        return {"data": str(path)}

    def run(self) -> None:
        """Section after section."""
        chosen = [s for s in SECTIONS if s in self.args.only and (s != "xla" or self.args.xla)]
        planned = {section: self.races(section) for section in chosen}
        while chosen:
            together = []  # sections of races, whose sides get ready at once
            while chosen and planned[chosen[0]]:
                together += planned[chosen.pop(0)]
            if together:
                self.run_races(together)
            elif section := chosen.pop(0):
                self.run_alone(section)

    def run_races(self, races: list[Race]) -> None:
        """Each prints a table."""
        course = Course(races, self.work, self.args.parallel, self.args.patience)
        try:
            for race in races:
                if self.left() < 15:
                    self.skip(race.title)
                    continue
                found = course.run(race, self.deadline)
                self.keep(race.title, tables.of_race(race, found, self))
        finally:
            course.close()

    def run_alone(self, section: str) -> None:
        """What starts processes of its own."""
        if self.left() < 30:
            self.skip(section)
            return
        found = {"first-step": self.first_step, "first-image": self.first_image,
                 "profile": self.profile}[section]()  # fmt: skip
        self.keep(section, found)

    def first_step(self) -> dict[str, Any]:
        """`train` with a cache that is empty, then with what it left there."""
        words = ["cifar10", "--model.dtype", self.args.dtype, "--train.log-every", "5"]
        if self.args.small or not self.args.gpu:
            words = ["digits", "--train.log-every", "5"]
        else:
            words += [w for k, v in self.data().items()
                      for w in ({"data_dir": "--data-dir", "data": "--data.name"}[k], v)]  # fmt: skip
        found = {
            name: starting.first_step(
                self.work / f"run-{name}", words, self.env(OURS, "started"), self.deadline
            )
            for name in ("cold", "warm")
        }
        shown = shlex.join(["ddim-jax", "train", *words]).replace(str(self.work), "FOLDER")
        shown = shown.replace(self.args.data_dir or "\0", "DIR")
        text = tables.starts(f"`{shown}` to its first five updates", found)
        return {"text": text, "command": shown, **found}

    def first_image(self) -> dict[str, Any]:
        """Of a single one."""
        ((_, steps),) = self.sizes(FIRST[self.args.gpu][-1:])
        spec = self.race("sampling", 1, [OURS], steps).specs[0]
        theirs = [s for s in self.args.sides if not peers.is_ours(s)]
        order = [(OURS, "cold"), (OURS, "warm"), *((s, "cold") for s in theirs)]
        found = {}
        for side, cache in order:
            if self.left() < 20:
                found[f"{side}, {cache}"] = {"why": "no time was left"}
                continue
            name = f"first-{tables.slug(side)}"
            env = self.env(side, name) | {"TORCHINDUCTOR_CACHE_DIR": str(self.work / name)}
            found[f"{side}, {cache}"] = starting.first_image(
                self.work, dict(spec) | {"side": side}, env, self.deadline
            )
        title = f"from a process's start to its first image, S = {steps}"
        return {"text": tables.starts(title, found), **found}

    def profile(self) -> dict[str, Any]:
        """Of `benchmarks.profile`."""
        if not self.args.gpu:
            return {"text": "profile: not run, as there is no GPU"}
        words = ["--json", str(self.work / "profile.json"), "--rounds", "3"]
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.profile", *words], text=True, check=False,
            capture_output=True, env=self.env(OURS), timeout=max(1.0, self.left()),
        )  # fmt: skip
        text = done.stdout if done.returncode == 0 else f"profile failed: {done.stderr[-500:]}"
        return {"text": text.strip()}

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def skip(self, title: str) -> None:
        """Names what there is no time for."""
        self.found["not run"][title] = "no time was left"
        self.write(f"\n{title}: not run, as no time was left")

    def keep(self, title: str, found: Mapping[str, Any]) -> None:
        """Prints and writes what is known by now."""
        self.found["sections"][title] = {k: v for k, v in found.items() if k != "text"}
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
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Page(args, pathlib.Path(folder))
        said = ", ".join(f"{k} {v}" for k, v in page.found["machine"]["versions"].items())
        print(f"# Benchmarks, {args.dtype}\n\n{page.found['command']}\n\n{said}", flush=True)
        page.run()
        print(f"\n{page.found['machine'].get('kind', 'no device was seen')}, {args.dtype}"
              + ("" if args.gpu else "; not run on a GPU"), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
