"""Plans run step by step from the host: one compiled step serves every S, η, τ and number.

A scan is compiled anew for every S, and on a GPU that takes longer than a cell of a table. Here a
step is a plan of one row: the host calls it S times, a few calls ahead of the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ddim_jax as ddim
from ddim_jax.arrays import image_keys
from ddim_jax.pictures.images import to_uint8
from ddim_jax.process.schedule_config import ScheduleConfig
from ddim_jax.sampling import clip_x0
from ddim_jax.sampling.inversion import invert_step
from ddim_jax.sampling.plan import (
    Plan,
    advance,
    check_network,
    no_memory,
    rows,
    single_rows,
    step_noise,
    with_noise,
)

WHOLE, SPLIT, PAST = PartitionSpec(), PartitionSpec("images"), PartitionSpec(None, "images")
MEMORY = 4  # of `with_memory`: every method of `ddim_jax.METHODS` is one program of it
AHEAD = 4  # steps that wait on the device: enough to keep it busy, few for others to wait behind


class Stepper:
    """Draws and encodes with one network, `size` images at a time on each device."""

    def __init__(self, model: ddim.Model):
        self.model = model
        self.mesh = Mesh(np.array(jax.local_devices()), ("images",))
        whole, self.split = (NamedSharding(self.mesh, spec) for spec in (WHOLE, SPLIT))
        self.whole = whole
        self.pixels = jax.jit(lambda x: (to_uint8(x), jnp.isfinite(x).all((1, 2, 3))))
        self.noise = jax.jit(
            lambda key, numbers: ddim.initial_noise(key, numbers, model.image_shape)
        )

    @functools.cached_property
    def params(self) -> Any:
        """The weights, on every device."""
        return self._place(self.model.params)

    def _place(self, params: Any) -> Any:
        """On every device, as the network computes with them."""
        return jax.device_put(self.model.computed(params), self.whole)

    @functools.cache  # noqa: B019 - one or two in a process
    def _step(self, clip: bool) -> Callable[..., jax.Array]:
        """Jitted (params, (x, past), row of a plan, key or None, numbers) → the next (x, past)."""
        model = ddim.predicts(self.model, x0_fn=clip_x0(1.0)) if clip else self.model
        classes = model.config.num_classes

        def step(params: Any, state: Any, row: Plan, key: Any, numbers: Any) -> Any:
            (x, past), now = state, jax.tree.map(lambda v: v[0], rows(row, state[0].dtype))
            z = None if key is None else step_noise(image_keys(key, numbers), now.t, x)
            labels = {} if classes is None or numbers is None else {"labels": numbers % classes}
            denoise = partial(model.apply_fn, params, **labels)
            return advance(denoise, x, past, now, z, x.dtype)[:2]

        specs = (WHOLE, (SPLIT, PAST), WHOLE, WHOLE, SPLIT)
        spread = jax.shard_map(
            step, mesh=self.mesh, in_specs=specs, out_specs=(SPLIT, PAST), check_vma=False
        )
        return jax.jit(spread)

    def run(self, x: jax.Array, plan: Plan, *, clip: bool = False, key: jax.Array | None = None,
            numbers: np.ndarray | None = None, params: Any = None) -> jax.Array:  # fmt: skip
        """x at the end of a plan, not waited for.

        Args:
          x: (n, ...) float32 with n a multiple of the number of devices.
          plan: of a method; those of one memory are one program, see `with_memory`.
          clip: clip each x̂_0 to [−1, 1].
          key: of the noise; a plan without any takes it too, for the program of the others.
          numbers: (n,) uint32, the images' numbers; with a key. Of K classes image k then has the
            (k mod K)-th.
          params: in place of the model's: those of another model with its network.
        """
        check_network(self.model.apply_fn, plan)
        if key is not None:
            plan = with_noise(plan)
        params = self.params if params is None else self._place(params)
        x, numbers = jax.device_put((x, numbers), self.split)
        past = None  # and no array of no elements, which XLA of JAX 0.11 dies of on many devices
        if plan.weights is not None:
            past = jax.device_put(no_memory(plan, x), NamedSharding(self.mesh, PAST))
        step, waiting = self._step(clip), deque[jax.Array]()
        for row in single_rows(plan):
            x, past = step(params, (x, past), row, key, numbers)
            waiting.append(x)
            if len(waiting) > AHEAD:
                waiting.popleft().block_until_ready()
        return x

    @functools.cache  # noqa: B019
    def _upwards(self, max_iterations: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Jitted (params, x_s, one row of a plan) → (x_t, network calls on each device)."""

        def up(params: Any, x: Any, row: Plan) -> tuple[jax.Array, jax.Array]:
            denoise = partial(self.model.apply_fn, params)
            x, calls = invert_step(denoise, x, row, max_iterations, x.dtype)
            return x, calls[None]

        specs = (WHOLE, SPLIT, WHOLE)
        return jax.jit(jax.shard_map(
            up, mesh=self.mesh, in_specs=specs, out_specs=(SPLIT, SPLIT), check_vma=False
        ))  # fmt: skip

    def invert(self, x_0: jax.Array, tau: np.ndarray, max_iterations: int) -> tuple[Any, Any]:
        """(x_T, (S, devices) network calls) of `ddim_jax.invert`, not waited for."""
        plan = ddim.ddim()(self.model.schedule, tau)
        plan = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)[::-1]), plan)
        x, calls = jax.device_put(x_0, self.split), []
        for i in range(len(tau)):
            row = jax.tree.map(lambda v, i=i: v[i], plan)
            x, count = self._upwards(max_iterations)(self.params, x, row)
            calls.append(count)
        return x, jnp.stack(calls)

    def draw(self, plan: Plan, seed: int, first: int, size: int, clip: bool) -> Any:
        """(uint8 images, whether each is finite) of `size` numbers from `first` on, not waited for.

        Image k is image k of `ddim_jax.generation.shards.generate` with that seed, of all classes.
        """
        keys = jax.random.split(jax.random.key(seed))
        numbers = np.arange(first, first + size, dtype=np.uint32)
        x_T = self.noise(keys[0], numbers)
        return self.pixels(self.run(x_T, plan, clip=clip, key=keys[1], numbers=numbers))


def numbers(plan: Plan) -> tuple[Any, ...]:
    """All that a plan's images follow from besides network, x_T and noise, to be compared.

    A step to s = 0 ends at x̂_0: where that is remembered, a correction of x_t before it is none.
    """
    if plan.corrects is not None and plan.remembers == "x_0":
        ends = np.asarray(plan.steps.direction)[:, None] == 0
        plan = dataclasses.replace(plan, corrects=np.where(ends, 0.0, plan.corrects))
    leaves, kind = jax.tree.flatten(plan)
    return kind, *((np.asarray(leaf) + 0.0).tobytes() for leaf in leaves)  # no −0


@functools.lru_cache(maxsize=2)
def stepper(
    name: str, config: str | None, schedule: str | None, prediction: str | None, dtype: str | None
) -> Stepper:
    """Of the model that the arguments name; one object in a process, so that it compiles once."""
    how = schedule and ScheduleConfig(schedule)
    return Stepper(
        ddim.load_model(name, config=config, schedule=how, prediction=prediction, dtype=dtype)
    )
