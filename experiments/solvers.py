"""Quality against network calls for every method and τ, and which to take at how many calls.

    python -m experiments.solvers [--model digits | --oracle] [--out results/solvers]

Two measures, on latents that chose no τ: the error to the fine ODE solution (Adams–Bashforth 3
along τ = 1..T; RMS, pixels in [−1, 1]) on --fine-samples of them, and the Fréchet distance to the
data on all, unless --rms-only. `--oracle` takes the exact denoiser of the digits for a network.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.pictures.images import to_model, to_uint8
from ddim_jax.sampling import find_method
from ddim_jax.sampling.plan import with_memory
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.stepping import MEMORY, numbers

SPACINGS = ("linear", "quadratic", "logsnr")
TAUS = (*SPACINGS, "optimised", "refined")
FINE = "adams-bashforth-3"
EVERY = ["ddim", "adams-bashforth-2", "adams-bashforth-3", "adams-bashforth-4", "dpm-solver-2",
         "dpm-solver-3", "unipc-2", "unipc-3", "pf-euler"]  # fmt: skip
SMALL = {"method": EVERY, "tau": list(TAUS), "steps": [5, 8, 10, 15, 20, 50],
         "num_images": ["150"], "fine_samples": 64, "fine_steps": 1000, "refine": [5], "sweeps": 2,
         "rms_only": False, "oracle": False}  # fmt: skip
FULL = {"num_images": ["50000"], "fine_samples": 512, "refine": [5, 8, 10], "sweeps": 5}
HELP = {
    "method": "rows: names of `ddim_jax.METHODS` that add no noise, or module:function",
    "tau": f"columns of each: {', '.join(TAUS)}",
    "fine_samples": "latents whose fine solution is computed, to choose τ and to judge",
    "fine_steps": "calls of the fine solution; fewer than T are along a quadratic τ",
    "refine": "S whose τ is refined on whole runs of each method",
    "sweeps": "of refine_timesteps",
    "rms_only": "no Fréchet distances: the error to the ODE alone",
    "oracle": "the exact denoiser of the digits in place of a network",
}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Runs every method on every τ at every S."""
    args = parse("solvers", __doc__.splitlines()[0], argv, SMALL, FULL, without=["spacing"], **HELP)
    experiment = Experiment("solvers", args)
    _check(experiment)
    if not args.rms_only and (lacking := experiment.without_data()):
        return lacking
    experiment.begin_with_model(data=not args.rms_only)
    bench, cells = _Bench(experiment), []
    same_as: dict[Any, str] = {}  # two τ may be one, and two methods at few calls
    for s in args.steps:
        taus: dict[str, Any] = {n: experiment.tau(s, n) for n in SPACINGS}
        if {"optimised", "refined"} & set(args.tau):
            found = experiment.cell(f"optimised-tau-S{s}", partial(bench.optimised, s))
            taus["optimised"] = np.array(found["tau"])
        for method in args.method:
            row, name = dict(taus), method.replace(":", ".")
            if "refined" in args.tau and s in args.refine:
                better = partial(bench.refined, method, list(taus.values()))
                found = experiment.cell(f"refined-tau-{name}-S{s}", better)
                row["refined"] = np.array(found["tau"])
            for n, tau in row.items():
                if n in args.tau:
                    judge = partial(bench.judge, method, tau, s)
                    steps = numbers(_padded(method)(bench.schedule, tau))
                    key = same_as.setdefault(steps, f"{name}-{n}-S{s}")
                    cell = experiment.cell(key, judge)
                    cells.append({"method": method, "tau": n, "S": s, **cell})
    best = {s: min((c for c in cells if c["S"] == s), key=lambda c: c["rms"]) for s in args.steps}
    for s, c in best.items():
        print(f"S = {s}: {c['method']}, {c['tau']} τ, RMS {c['rms']:.4g} ± {c['rms_se']:.1g}",
              flush=True)  # fmt: skip
    series: dict[str, Any] = {}
    for method in args.method:
        row = [min((c for c in cells if (c["method"], c["S"]) == (method, s)),
                   key=lambda c: c["rms"]) for s in args.steps]  # fmt: skip
        series[method] = tuple([c[k] for c in row] for k in ("S", "rms", "rms_se"))
    figure = drawing.lines(series, "network calls S", "RMS error to the fine solution")
    caption = (
        f"RMS over pixels and {args.fine_samples} latents of the difference to {FINE} along "
        f"{len(bench.everything)} of T steps, pixels in [−1, 1], each method on its best τ; bars "
        "are one standard error."
    )
    more: Cell = {"best": list(best.values())}
    if not args.rms_only:
        caption += (
            f" In the table also {cells[0]['name']} of {cells[0]['num_images']:,} samples against "
            "the data."
        )
        more["floors"] = [experiment.floor(n) for n in sorted({c["num_images"] for c in cells})]
        more["name"] = cells[0]["name"]
    return experiment.finish(cells, figure, caption, **more)


def _check(experiment: Experiment) -> None:
    """Before anything is written."""
    args = experiment.args
    if args.oracle and args.model:
        raise ValueError(f"--oracle stands in place of a network: no --model, got {args.model!r}")
    if unknown := set(args.tau) - set(TAUS):
        raise ValueError(f"--tau takes {', '.join(TAUS)}, got {' '.join(sorted(unknown))}")
    for name in ("method", "tau"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"--{name} must not name a value twice, got {getattr(args, name)}")
    if args.tau == ["refined"] and (lacking := sorted(set(args.steps) - set(args.refine))):
        raise ValueError(f"--tau refined alone needs --refine to name every S, not {lacking}")
    if args.fine_steps <= max(args.steps):
        raise ValueError(f"--fine-steps must be above every S, here {max(args.steps)}, got "
                         f"{args.fine_steps}")  # fmt: skip
    least = min(experiment.num_images(s) for s in args.steps)
    if not 2 <= args.fine_samples <= least:
        raise ValueError(f"--fine-samples must be in 2..{least}, the least of --num-images, got "
                         f"{args.fine_samples}")  # fmt: skip
    methods = [find_method(name) for name in args.method]
    if args.oracle:
        experiment.model, args.model = _oracle(), "the exact denoiser of the digits"
    tau = experiment.tau(args.steps[0])
    for name, method in zip(args.method, methods, strict=True):
        if method(experiment.model.schedule, tau).steps.sigma is not None:
            raise ValueError(f"{name} adds noise, follows no ODE: see `table1 --eta {name}`")


class _Bench:
    """Samplers, latents and fine solutions, computed when first needed."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.model = experiment, experiment.model
        self.schedule = self.model.schedule
        T = self.schedule.num_steps
        fine = min(experiment.args.fine_steps, T)
        self.everything = ddim.timesteps(T, fine, "linear" if fine == T else "quadratic")
        self.sampler = ddim.make_sampler(self.model, self.everything)
        self.fine = functools.cache(
            lambda which: self.solve(FINE, self.latents(which), self.everything)
        )

    def latents(self, which: str, number: int | None = None) -> jax.Array:
        """ "judge" or "choose": the first `number` latents, --fine-samples of them by default."""
        keys = jax.random.split(jax.random.key(self.experiment.args.seed))
        number = number or self.experiment.args.fine_samples
        return ddim.initial_noise(keys[int(which == "choose")], number, self.model.image_shape)

    def solve(self, method: str, x_T: jax.Array, tau: np.ndarray) -> np.ndarray:
        """x_0 of all latents, batches of one size after one another; none waits for the host."""
        size = self.experiment.args.batch_size
        lack = -len(x_T) % min(size, len(x_T))
        x = jnp.concatenate([x_T, x_T[:lack]])
        size = min(size, len(x_T))
        how = {"tau": tau, "method": _padded(method)}
        parts = [self.sampler(x[i : i + size], **how) for i in range(0, len(x), size)]
        return np.concatenate(jax.device_get(parts))[: len(x_T)]

    def judge(self, method: str, tau: np.ndarray, steps: int) -> Cell:
        """Both measures of one method and τ."""
        args, fine = self.experiment.args, self.fine("judge")
        number = len(fine) if args.rms_only else self.experiment.num_images(steps)
        drawn = self.solve(method, self.latents("judge", number), tau)
        squares = (drawn[: len(fine)].astype(np.float64) - fine) ** 2
        per_image = squares.reshape(len(fine), -1).mean(axis=1)
        rms = float(np.sqrt(per_image.mean()))
        se = float(per_image.std(ddof=1) / np.sqrt(len(fine)) / (2 * rms)) if rms else 0.0
        cell = {"rms": rms, "rms_se": se, "fine_samples": len(fine)}
        if args.rms_only:
            return cell
        return cell | self.experiment.score(np.asarray(to_uint8(jnp.asarray(drawn))))

    @functools.cached_property
    def errors(self) -> ddim.StepErrors:
        """What single steps cost, on the latents that choose."""
        T = self.schedule.num_steps
        estimate = jax.jit(
            lambda p, x: ddim.step_errors(
                partial(self.model.apply_fn, p), x, self.schedule
            )._replace(t=0)
        )
        some = self.latents("choose")[:64]
        return estimate(self.model.params, some)._replace(t=ddim.timesteps(T, min(T, 200)))

    def optimised(self, steps: int) -> Cell:
        """τ by dynamic programming, on DDIM's steps."""
        return {"tau": ddim.optimise_timesteps(self.errors, steps).tolist()}

    def refined(self, method: str, taus: list[np.ndarray]) -> Cell:
        """τ of one method, by coordinate descent from the best of `taus`; other latents choose."""
        better = ddim.refine_timesteps(
            lambda x, tau: jnp.asarray(self.solve(method, x, tau)),
            self.latents("choose"),
            jnp.asarray(self.fine("choose")),
            np.stack(taus),
            self.schedule.num_steps,
            sweeps=self.experiment.args.sweeps,
        )
        return {"tau": better.tolist()}


def _padded(method: str) -> ddim.Method:
    """Of one memory, so that all are one program."""
    return lambda *of: with_memory(find_method(method)(*of), MEMORY)


def _oracle() -> ddim.Model:
    """The exact denoiser of the digits, in the shape of a model."""
    schedule = ddim.linear_schedule(1000)
    exact = ddim.oracle.empirical(schedule, to_model(load("digits").arrays()["image"]))
    shipped = ddim.load_model("digits")
    facts = {"data": shipped.facts["data"], "preset": "oracle"}
    return ddim.Model(lambda _, x, t: exact(x, t), {}, schedule, shipped.config, facts)


if __name__ == "__main__":
    run(main)
