"""Every table and figure of the paper, small, and the page of them: what `make paper` runs.

    python -m experiments.paper [--model digits] [--out results]

One process, so that a network is compiled once for most of them. The sizes suit two CPU cores:
each experiment's own for networks like the digits', fewer images and steps for one that takes more
than a GFLOP an image. Killed and called again, it goes on. What needs data that are not at hand
says so, or does without: Table 1 of CIFAR-10 takes the statistics that ship, Table 2 then encodes
what the model draws.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import time
from collections.abc import Sequence

import ddim_jax as ddim
from ddim_jax.networks.flops import flops_per_image
from experiments import report
from experiments.arguments import run

PARTS = {  # → words where the network is large: 25,000 network calls in all
    "table1": "--steps 10 20 --eta 0 0.5 1 hat --num-images 96",
    "table2": "--steps 10 20 50 --num-images 8 --exact-steps 10 --exact-samples 8 "
    "--max-iterations 20 --reach-samples 8",
    "fig3": "--steps 10 20 --num-images 16 --shown 16",
    "fig4": "--steps 5 10 20 --num-images 8 --repeats 3",
    "fig5": "--steps 10 20 50 --num-images 8 --shown 8",
    "fig6": "--steps 20 --paths 8 --points 7",
    "solvers": "--rms-only --method ddim adams-bashforth-2 adams-bashforth-3 unipc-2 pf-euler "
    "--tau linear quadratic --steps 5 10 --num-images 8 --fine-samples 8 --fine-steps 100",
    "discrete": "--steps 1 5 20 --train-steps 400",
    "table3": "",
}
WITHOUT_MODEL = ("discrete", "table3")
BATCH = "--batch-size 16"
GFLOP = 1e9


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Runs all, and returns the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.paper", description=__doc__)
    parser.add_argument("--model", default="digits", help="what `ddim_jax.load_model` takes")
    parser.add_argument("--data-dir", help="where TFDS data lie; by default $DDIM_JAX_DATA")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    args = parser.parse_args(argv)
    model = ddim.load_model(args.model)
    large = flops_per_image(model.apply_fn, model.params, (1, *model.image_shape)) > GFLOP
    common = ["--model", args.model, "--or-not-run"]
    common += ["--data-dir", args.data_dir] if args.data_dir else []
    began, spent = time.perf_counter(), time.process_time()
    for name, size in PARTS.items():
        words = [] if name in WITHOUT_MODEL else [*(BATCH.split() if large else []), *common]
        words += size.split() if large else []
        start, cpu = time.perf_counter(), time.process_time()
        experiment = importlib.import_module(f"experiments.{name}")
        experiment.main([*words, "--out", str(args.out / name)])
        print(f"{name}: {time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} CPU-s",
              flush=True)  # fmt: skip
    whole, cpu = time.perf_counter() - began, time.process_time() - spent
    print(f"all: {whole / 60:.1f} minutes, {cpu / 60:.1f} CPU-minutes", flush=True)
    return report.main([str(args.out)])


if __name__ == "__main__":
    run(main)
