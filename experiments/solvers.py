"""Quality against network calls for every solver and τ: DDIM, Eq. 15, Adams–Bashforth, chosen τ.

    python -m experiments.solvers [--model digits | --oracle] [--out results/solvers]

Two measures, on latents that chose no τ: the error to the fine ODE solution (DDIM at η = 0 with
τ = 1..T; RMS, pixels in [−1, 1]) on --fine-samples of them, and the Fréchet distance to the data on
all. `--oracle` takes the exact denoiser of the digits themselves in place of a network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.pictures.images import to_model, to_uint8
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment

SMALL = {"steps": [5, 10, 20], "num_images": ["150"], "fine_samples": 24, "refine": [5, 10],
         "sweeps": 3, "oracle": False}  # fmt: skip
FULL = {"steps": [5, 10, 20, 50], "num_images": ["50000"], "fine_samples": 512, "sweeps": 10}
HELP = {
    "fine_samples": "latents whose fine solution is computed, to choose τ and to judge",
    "refine": "S whose optimised τ is refined on whole runs; 0 for none",
    "sweeps": "of refine_timesteps",
    "oracle": "the exact denoiser of the digits in place of a network",
}
SPACINGS = ("linear", "quadratic", "logsnr")


def main(argv: Sequence[str] | None = None) -> Cell:
    """Runs every solver at every S."""
    args = parse("solvers", __doc__.splitlines()[0], argv, SMALL, FULL, without=["spacing"], **HELP)
    experiment = Experiment("solvers", args)
    if args.oracle and args.model:
        raise ValueError(f"--oracle stands in place of a network: no --model, got {args.model!r}")
    if args.oracle:
        experiment.model, args.model = _oracle(), "the exact denoiser of the digits"
    least = min(experiment.num_images(s) for s in args.steps)
    if not 2 <= args.fine_samples <= least:
        raise ValueError(f"--fine-samples must be in 2..{least}, the least of --num-images, got "
                         f"{args.fine_samples}")  # fmt: skip
    experiment.begin_with_model()
    bench = _Bench(experiment)
    cells = []
    for s in args.steps:
        taus: dict[str, Any] = {n: experiment.tau(s, n) for n in SPACINGS}
        optimal = experiment.cell(f"optimised-tau-S{s}", partial(bench.optimised, s))
        taus["optimised"] = np.array(optimal["tau"])
        if s in args.refine:
            better = experiment.cell(f"refined-tau-S{s}", partial(bench.refined, taus["optimised"]))
            taus["refined"] = np.array(better["tau"])
        runs = {f"DDIM, {n}": ("ddim", tau) for n, tau in taus.items()}
        runs["Eq. 15, linear"] = ("eq15", taus["linear"])
        runs |= {f"AB{k}, {n}": (f"ab{k}", taus[n]) for k in (2, 3, 4) for n in SPACINGS}
        for name, (method, tau) in runs.items():
            key = f"{name}-S{s}".replace(", ", "-").replace(" ", "")
            cell = experiment.cell(key, partial(bench.judge, method, tau, s))
            cells.append({"method": name, "S": s, **cell})
    shown = ["DDIM, linear", "DDIM, quadratic", "DDIM, optimised", "DDIM, refined",
             "Eq. 15, linear", "AB2, linear", "AB3, linear", "AB4, linear"]  # fmt: skip
    series: dict[str, Any] = {}
    for name in shown:
        row = [c for c in cells if c["method"] == name]
        if row:
            series[name] = tuple([c[k] for c in row] for k in ("S", "rms", "rms_se"))
    figure = drawing.lines(series, "network calls S", "RMS error to the fine solution")
    floors = [experiment.floor(n) for n in sorted({c["num_images"] for c in cells})]
    caption = (
        f"RMS over pixels and {args.fine_samples} latents of the difference to τ = 1..T, pixels in "
        f"[−1, 1]; bars are one standard error. In the table also {cells[0]['name']} of "
        f"{cells[0]['num_images']:,} samples against the data."
    )
    return experiment.finish(cells, figure, caption, floors=floors, name=cells[0]["name"])


class _Bench:
    """Samplers, latents and fine solutions, computed when first needed."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.model = experiment, experiment.model
        self.schedule = self.model.schedule
        everything = np.arange(1, self.schedule.num_steps + 1)
        self.fine = functools.cache(
            lambda which: self.solve("ddim", self.latents(which), everything)
        )

    def latents(self, which: str, number: int | None = None) -> jax.Array:
        """ "judge" or "choose": the first `number` latents, --fine-samples of them by default."""
        keys = jax.random.split(jax.random.key(self.experiment.args.seed))
        number = number or self.experiment.args.fine_samples
        return ddim.initial_noise(keys[int(which == "choose")], number, self.model.image_shape)

    @functools.cache  # noqa: B019 - one bench a process
    def _jitted(self, method: str) -> Callable[..., jax.Array]:
        methods = {"ddim": ddim.ddim(), "eq15": ddim.pf_euler()}
        chosen = methods.get(method) or ddim.adams_bashforth(int(method[2:]))

        def solve(params: Any, x: jax.Array, tau: jax.Array) -> jax.Array:
            denoise = partial(self.model.apply_fn, params)
            return ddim.sample(denoise, x, self.schedule, tau, method=chosen)

        return jax.jit(solve)

    def solve(self, method: str, x_T: jax.Array, tau: np.ndarray) -> np.ndarray:
        """x_0 of all latents, a batch at a time."""
        size, run = self.experiment.args.batch_size, self._jitted(method)
        parts = [run(self.model.params, x_T[i : i + size], tau) for i in range(0, len(x_T), size)]
        return np.concatenate(jax.device_get(parts))

    def judge(self, method: str, tau: np.ndarray, steps: int) -> Cell:
        """Both measures of one solver and τ."""
        number = self.experiment.num_images(steps)
        drawn = self.solve(method, self.latents("judge", number), tau)
        fine = self.fine("judge")
        squares = (drawn[: len(fine)].astype(np.float64) - fine) ** 2
        per_image = squares.reshape(len(fine), -1).mean(axis=1)
        rms = float(np.sqrt(per_image.mean()))
        se = float(per_image.std(ddof=1) / np.sqrt(len(fine)) / (2 * rms)) if rms else 0.0
        score = self.experiment.score(np.asarray(to_uint8(jnp.asarray(drawn))))
        return {"rms": rms, "rms_se": se, "fine_samples": len(fine), **score}

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
        """τ by dynamic programming."""
        return {"tau": ddim.optimise_timesteps(self.errors, steps).tolist()}

    def refined(self, tau: np.ndarray) -> Cell:
        """τ by coordinate descent from there, on the latents that choose."""
        better = ddim.refine_timesteps(
            lambda x, tau: jnp.asarray(self.solve("ddim", x, tau)),
            self.latents("choose"),
            jnp.asarray(self.fine("choose")),
            tau,
            self.schedule.num_steps,
            sweeps=self.experiment.args.sweeps,
        )
        return {"tau": better.tolist()}


def _oracle() -> ddim.Model:
    """The exact denoiser of the digits, in the shape of a model."""
    schedule = ddim.linear_schedule(1000)
    exact = ddim.oracle.empirical(schedule, to_model(load("digits").arrays()["image"]))
    shipped = ddim.load_model("digits")
    facts = {"data": shipped.facts["data"], "preset": "oracle"}
    return ddim.Model(lambda _, x, t: exact(x, t), {}, schedule, shipped.config, facts)


if __name__ == "__main__":
    run(main)
