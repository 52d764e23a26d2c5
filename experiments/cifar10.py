"""The paper's tables and figures for one CIFAR-10 model on one GPU, the most valuable first.

    python -m experiments.cifar10 --model FILE --data-dir DIR --extractor resnet56 \\
        --out results/cifar10 [--seconds 560]

One process, so that each network is compiled once. A killed run, or one that --seconds ended,
called again, goes on from the last batch. Estimates are for one H100 (19,000 network calls a
second in bfloat16, 8,500 in float32); compiling takes a minute or two in the first call.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ddim_jax.storage.files import portable
from experiments import fig3, fig4, fig5, fig6, report, table1, table2
from experiments.arguments import run
from experiments.pipeline import STARTED, OutOfTimeError
from experiments.provenance import read_json


class Part(NamedTuple):
    """One experiment's words, and what stands for them in a rehearsal."""

    folder: str
    main: Callable[[Sequence[str]], Any]
    words: str
    rehearsal: str
    seconds: int  # estimate for one H100
    extractor: bool = False


FAST = "--dtype bfloat16 --batch-size 512"
EXACT = "--exact-steps 10 20 50 --exact-samples 128 --max-iterations 60"
NO_EXACT = "--exact-steps 0 --exact-samples 128"
TINY = "--steps 2 3 --num-images 4 --batch-size 4"
TINY_TABLE2 = f"{TINY} --exact-samples 4 --max-iterations 4 --reach-steps 2 --reach-samples 4"
TEST = "--dtype float32 --batch-size 128"
PARTS = (
    Part("table1-cifar10", table1.main,
         f"{FAST} --steps 10 20 50 100 --eta 0 0.2 0.5 1 hat --num-images 10000",
         f"--dtype bfloat16 --eta 0 hat {TINY}", 500, True),
    Part("table2-cifar10", table2.main,
         f"{TEST} --spacing quadratic --steps 10 20 50 100 200 500 1000 --num-images 1024 200=256 "
         f"500=256 1000=128 --reach-steps 10 20 --reach-samples 128 {EXACT}",
         f"--spacing quadratic --exact-steps 2 {TINY_TABLE2}", 350),
    Part("table2-cifar10-quad", table2.main,
         f"{TEST} --spacing quad --steps 10 20 50 100 200 --num-images 1024 200=256 "
         f"--reach-steps 10 20 --reach-samples 128 {NO_EXACT}",
         f"--spacing quad --exact-steps 0 {TINY_TABLE2}", 130),
    Part("table2-cifar10-linear", table2.main,
         f"{TEST} --spacing linear --steps 10 20 50 100 200 500 --num-images 1024 200=256 500=256 "
         f"--reach-steps 10 --reach-samples 128 {EXACT}",
         f"--spacing linear --exact-steps 2 {TINY_TABLE2}", 250),
    Part("fig3-cifar10", fig3.main,
         f"{FAST} --steps 10 20 50 100 --eta 0 1 hat --num-images 512 --shown 36",
         f"--dtype bfloat16 --eta 0 hat --shown 4 {TINY}", 16),
    Part("fig6-cifar10", fig6.main, f"{FAST} --steps 50 --paths 93 --shown 8 --points 11",
         "--dtype bfloat16 --steps 2 --paths 2 --shown 2 --points 3 --batch-size 4", 8),
    Part("fig5-cifar10", fig5.main,
         f"{FAST} --steps 10 20 50 100 1000 --num-images 512 --shown 10",
         f"--dtype bfloat16 --shown 3 {TINY}", 42),
    Part("fig4-cifar10", fig4.main,
         "--dtype bfloat16 --steps 10 20 50 100 200 --num-images 128 --repeats 3",
         "--dtype bfloat16 --steps 1 2 3 --num-images 4 --repeats 1", 60),
    Part("table1-cifar10-s1000", table1.main,
         f"{FAST} --steps 1000 --eta hat 0 1 0.5 0.2 --num-images 2000",
         "--dtype bfloat16 --steps 3 --eta hat --num-images 4 --batch-size 4", 530, True),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Runs the parts in order, and returns the folders that are whole."""
    parser = argparse.ArgumentParser(prog="python -m experiments.cifar10", description=__doc__)
    parser.add_argument("--model", required=True, help="of CIFAR-10, for `ddim_jax.load_model`")
    parser.add_argument("--data-dir", help="where TFDS data lie; by default $DDIM_JAX_DATA")
    parser.add_argument("--extractor", default="resnet56", help="that, or inception:PATH")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/cifar10"))
    parser.add_argument("--seconds", type=int, help="begin no further batch after so long")
    parser.add_argument("--only", nargs="+", choices=[part.folder for part in PARTS])
    parser.add_argument("--rehearse", action="store_true", help="a few images, a few steps")
    args = parser.parse_args(argv)
    if args.rehearse and args.out.name == "cifar10":
        raise ValueError("a rehearsal's figures are of no use: give it an --out of its own")
    done: list[str] = []
    for part in PARTS:
        if args.only and part.folder not in args.only:
            continue
        words = [*(part.rehearsal if args.rehearse else part.words).split(), "--model", args.model]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        words += ["--extractor", args.extractor] if part.extractor else []
        if is_whole(args.out / part.folder, words):
            done.append(part.folder)
            _say(f"{part.folder} was whole")
            continue
        if args.seconds:
            words += ["--seconds", str(args.seconds)]
        if part.extractor:
            _share_reference(args.out, part.folder)
        _say(f"{part.folder} begins, {part.seconds} s by estimate")
        try:
            if args.seconds and time.monotonic() - STARTED > args.seconds:
                raise OutOfTimeError
            result = part.main([*words, "--out", str(args.out / part.folder)])
        except OutOfTimeError:
            _say(f"{args.seconds} s are over; the same command goes on from here")
            break
        if missing := result.get("missing"):
            _say(f"{part.folder}: {len(missing)} cells are left: {' '.join(missing)}")
            break
        done.append(part.folder)
        _say(f"{part.folder} is whole")
    if args.out.exists():
        report.main([str(args.out)])
    return done


def is_whole(folder: pathlib.Path, words: Sequence[str]) -> bool:
    """Whether the folder's result is of these words, whatever its time, and lacks no cell."""
    path = folder / "result.json"
    if not path.exists():
        return False
    result = read_json(path)
    said = shlex.split(result["command"])[3:]  # python -m experiments.NAME
    for option in ("--seconds", "--out"):
        if option in said:
            at = said.index(option)
            del said[at : at + 2]
    return not result.get("missing") and said == [portable(w) for w in words]


def _share_reference(out: pathlib.Path, folder: str) -> None:
    """The data's statistics take as long as a cell: another part's serve this one too."""
    mine = out / folder / "reference.npz"
    others = [path for path in sorted(out.glob("*/reference.npz")) if path != mine]
    if others and not mine.exists():
        mine.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(others[0], mine)


def _say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


if __name__ == "__main__":
    run(main)
