"""What the sampler costs beside the network: time of `sample` over S × (one network call).

    python experiments/benchmarks/sampler_overhead.py [--steps 10] [--batch 8] [--repeats 5]

The CIFAR-10 network of the paper (35.7 M parameters) at random weights. Calls and sampling runs
alternate, so that a busy machine slows both; the ratio of the medians is the figure. The limit is
the network's own arithmetic, 11.7 GFLOP an image and call.
"""

import argparse
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.unet import UNetConfig, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    config = UNetConfig()
    apply_fn, params = build(config, jax.random.key(0))
    schedule = ddim.linear_schedule(1000)
    sampler = ddim.make_sampler(apply_fn, schedule, ddim.timesteps(1000, args.steps))
    network = jax.jit(apply_fn)
    x_T = ddim.initial_noise(jax.random.key(1), args.batch, (32, 32, 3))
    t = jnp.full((args.batch,), 500)

    def seconds(run) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    def calls() -> jax.Array:
        for _ in range(args.steps):
            out = network(params, x_T, t)
            out.block_until_ready()
        return out

    compile_seconds = seconds(lambda: sampler(params, x_T))
    calls()
    pairs = [(seconds(calls), seconds(lambda: sampler(params, x_T))) for _ in range(args.repeats)]
    one, all_ = np.median(np.array(pairs), axis=0)
    flops = network.lower(params, x_T, t).compile().cost_analysis()["flops"]
    print(
        json.dumps(
            {
                "ratio": round(float(all_ / one), 4),
                "ratios": [round(b / a, 4) for a, b in pairs],
                "ms_per_image_and_call": round(float(one) / args.steps / args.batch * 1e3, 2),
                "achieved_gflops_per_second": round(flops * args.steps / float(all_) / 1e9, 1),
                "compile_seconds": round(compile_seconds, 1),
                "steps": args.steps,
                "batch": args.batch,
                "device": jax.devices()[0].device_kind,
                "machine": platform.processor() or platform.machine(),
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
