"""Error to the fine ODE solution against the number of network calls S, for every solver and τ.

    python experiments/solvers.py [--model digits | --oracle] [--images 256] [--steps 5 10 20 50]

The fine solution is DDIM at η = 0 with τ = 1..T. Errors are RMS over pixels and latents, pixels in
[−1, 1], on latents that were not used to choose any τ. `--oracle` takes the exact denoiser of the
digits themselves in place of a network. Needs only what the package ships.
"""

import argparse

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.images import to_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--sweeps", type=int, default=10, help="of refine_timesteps; 0 skips it")
    args = parser.parse_args()

    if args.oracle:
        schedule = ddim.linear_schedule(1000)
        data = to_model(load("digits").arrays()["image"])
        exact = ddim.oracle.empirical(schedule, data)
        shape, params = data.shape[1:], None

        def apply_fn(_, x, t):
            return exact(x, t)
    else:
        model = ddim.load_model(args.model)
        schedule, shape, params, apply_fn = (
            model.schedule,
            model.image_shape,
            model.params,
            model.apply_fn,
        )
    T = schedule.num_steps
    chosen_on = ddim.initial_noise(jax.random.key(1), args.images, shape)
    judged_on = ddim.initial_noise(jax.random.key(2), args.images, shape)

    def solver(method, **options):
        def solve(params, x, tau):
            return method(lambda x, t: apply_fn(params, x, t), x, schedule, tau, **options)

        jitted = jax.jit(solve)
        return lambda x, tau: jitted(params, x, np.asarray(tau))

    plain = solver(ddim.sample)
    everything = np.arange(1, T + 1)
    fine, fine_chosen = plain(judged_on, everything), plain(chosen_on, everything)
    estimate = jax.jit(
        lambda p, x: ddim.step_errors(lambda x, t: apply_fn(p, x, t), x, schedule)._replace(t=0)
    )
    t = ddim.timesteps(T, min(T, 200))
    errors = estimate(params, chosen_on[:64])._replace(t=t)

    def rms(x) -> float:
        return float(np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(fine)) ** 2)))

    rows: dict[str, list[str]] = {}

    def record(name: str, x) -> None:
        rows.setdefault(name, []).append(f"{rms(x):.4f}")

    for steps in args.steps:
        spacings = {
            name: ddim.timesteps(T, steps, name, schedule=schedule)
            for name in ("linear", "quadratic", "logsnr")
        }
        for name, tau in spacings.items():
            record(f"DDIM, {name}", plain(judged_on, tau))
        optimal = ddim.optimise_timesteps(errors, steps)
        record("DDIM, optimised τ", plain(judged_on, optimal))
        if args.sweeps:
            refined = ddim.refine_timesteps(
                plain, chosen_on, fine_chosen, optimal, T, sweeps=args.sweeps
            )
            record("DDIM, optimised and refined τ", plain(judged_on, refined))
        record(
            "Eq. 15 (Euler in dt), linear",
            solver(ddim.pf_euler_sample)(judged_on, spacings["linear"]),
        )
        for order in (2, 3, 4):
            multistep = solver(ddim.multistep_sample, order=order)
            for name, tau in spacings.items():
                record(f"AB{order}, {name}", multistep(judged_on, tau))
        print(f"S = {steps}: optimised τ {optimal.tolist()}", flush=True)
    print("| RMS error to τ = 1..T | " + " | ".join(f"S = {s}" for s in args.steps) + " |")
    print("|---" * (1 + len(args.steps)) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
