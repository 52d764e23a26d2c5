"""Encode and decode the digits: the plain encoder of Table 2 beside the exact inverse.

    python experiments/inversion.py [--model digits] [--images 64] [--steps 10 20 50]

Needs only what the package ships. Prints one row for each S: per-dimension mean squared error with
pixels in [0, 1] (the paper's measure), for ε at the target and at the source of each step, and the
exact inverse's share of converged images with its median and largest round-trip error.
"""

import argparse
import warnings

import jax
import numpy as np

import ddim_jax as ddim
from ddim_jax.data import load
from ddim_jax.images import to_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    args = parser.parse_args()

    model = ddim.load_model(args.model)
    images = load("digits").arrays()["image"]
    chosen = np.random.default_rng(0).choice(len(images), args.images, replace=False)
    x_0 = to_model(images[chosen])
    print("| S | plain, target | plain, source | exact: converged | median error | largest error |")
    print("|---|---|---|---|---|---|")
    for steps in args.steps:
        tau = ddim.timesteps(model.schedule.num_steps, steps)

        def plain(params, x, eps_at, tau=tau):
            def denoise(x, t):
                return model.apply_fn(params, x, t)

            x_T = ddim.encode(denoise, x, model.schedule, tau, eps_at=eps_at)
            return ddim.reconstruction_error(x, ddim.sample(denoise, x_T, model.schedule, tau))

        run = jax.jit(plain, static_argnames="eps_at")
        target, source = (float(run(model.params, x_0, e).mean()) for e in ("target", "source"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # reported in the row
            inverse = ddim.invert(model.denoise, x_0, model.schedule, tau)
        residual = np.asarray(inverse.residual)
        print(
            f"| {steps} | {target:.5f} | {source:.5f} | {np.mean(inverse.converged):.0%} | "
            f"{np.median(residual):.1e} | {residual.max():.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
