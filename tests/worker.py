"""Trains a small network on digits in a process of its own: `python -m tests.worker '{JSON}'`.

The tests kill it, and start two at once.
"""

import json
import sys

import jax


def main(options: dict) -> None:
    jax.config.update("jax_num_cpu_devices", options.get("devices", 1))
    jax.config.update("jax_compilation_cache_dir", options["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    from ddim_jax import parallel

    parallel.initialize(*options.get("processes", ()))
    from ddim_jax.data import load
    from ddim_jax.loop import fit
    from ddim_jax.schedule import linear_schedule
    from ddim_jax.training import TrainConfig
    from ddim_jax.unet import UNetConfig, build

    model = UNetConfig(image_size=8, in_channels=1, channels=32, multipliers=(1,), num_blocks=1,
                       attention_resolutions=())  # fmt: skip
    apply_fn, params = build(model, jax.random.key(0))
    config = TrainConfig(**options["train"])
    fit(
        apply_fn,
        params,
        linear_schedule(1000),
        load("digits"),
        config,
        options["directory"],
        resume=options.get("resume", "auto"),
        progress=False,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
