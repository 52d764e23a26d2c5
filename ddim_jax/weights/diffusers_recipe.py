"""How a pipeline of the diffusers library samples, in our words: τ, method, what becomes of x̂_0.

Its scheduler says all of it in scheduler_config.json, which a model keeps in `facts["sampling"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.arrays import Array
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps, timesteps
from ddim_jax.sampling import Method, clip_x0, ddim, ddpm, dynamic_threshold
from ddim_jax.sampling.plan import Plan
from ddim_jax.weights.diffusers_methods import (
    ddim_to_first,
    half_log_snr,
    karras,
    lu,
    multistep,
    pndm,
    solver,
    unipc_steps,
)
from ddim_jax.weights.diffusers_scheduler import PIPELINES, SCHEDULERS, refuse
from ddim_jax.weights.diffusers_settings import KNOWN, SAMPLERS


class Recipe(NamedTuple):
    """How to draw."""

    name: str  # the scheduler's class
    steps: int  # S, where none is asked for
    tau: Callable[[Schedule, int], np.ndarray]  # (schedule, S) → τ
    method: Method
    x0_fn: Callable[[Array], Array] | None
    rederive_eps: bool


def recipe(
    settings: Mapping[str, Any], eta: float | None = None, prediction: str = "eps"
) -> Recipe:
    """The recipe of a scheduler_config.json.

    As in diffusers, a `DDIMPipeline` and a `PNDMPipeline` (`_pipeline`) take any scheduler's
    settings for their own scheduler, and settings of another class mean nothing.

    Args:
      settings: `model.facts["sampling"]`; what is not in it has diffusers' default.
      eta: of DDIM; 0 by default, as in its pipeline.
      prediction: what the network predicts.

    Returns:
      A `Recipe`.

    Raises:
      ValueError: naming all settings that are not supported, and what would do.

    Example:
      >>> import ddim_jax as ddim
      >>> how = recipe({"_class_name": "UniPCMultistepScheduler", "timestep_spacing": "trailing"})
      >>> how.tau(ddim.linear_schedule(1000), 4).tolist()
      [250, 500, 750, 1000]
    """
    pipeline = settings.get("_pipeline")
    name = str(settings.get("_class_name", "DDIMScheduler")).replace("Parallel", "")
    if pipeline in ("DDIMPipeline", "PNDMPipeline"):
        name = str(pipeline).replace("Pipeline", "Scheduler")
    if name not in SAMPLERS:
        hint = "its noise schedule is" if name in SCHEDULERS else ""
        _refuse([(f"how {name} samples is not read" + (f", {hint}" if hint else ""),
                 ", ".join(SAMPLERS))])  # fmt: skip
    own = SAMPLERS[name]
    value = {field: settings.get(field, setting.default) for field, setting in own.items()}
    problems = [
        (f"{field} is {value[field]!r}", setting.read)
        for field, setting in own.items()
        if not setting.ok(value[field])
    ]
    unknown = sorted(f for f in settings if not f.startswith("_") and f not in KNOWN)
    problems += [(f"{field} is unknown", "") for field in unknown]
    _refuse(problems + ([] if problems else _contradictions(name, value, settings, prediction)))
    if eta is not None and name != "DDIMScheduler":
        raise ValueError(
            f"eta = {eta} goes with DDIMScheduler, and this model is drawn by {name}: leave it "
            "out, or give method=ddim_jax.ddim(eta)"
        )
    return Recipe(
        name,
        PIPELINES.get(str(pipeline), 50),
        partial(_tau, name, value),
        _method(name, value, eta or 0.0),
        _x0_fn(value),
        name != "DDIMScheduler",
    )


_refuse = partial(
    refuse,
    advice="; ddim_jax.make_sampler(model, tau, method=...) draws without it, "
    "and a command without --as-stored",
)


def _contradictions(
    name: str, value: Mapping[str, Any], settings: Mapping[str, Any], prediction: str
) -> list[tuple[str, str]]:
    """Settings that are read, but not together."""
    found = []
    kind = value.get("algorithm_type")
    if name == "PNDMScheduler" and prediction != "eps":
        found.append((f"the network predicts {prediction}, whose outputs PNDM adds up as they are",
                      "'eps'"))  # fmt: skip
    if kind == "sde-dpmsolver++" and value["solver_order"] == 3:
        found.append(("solver_order is 3 with 'sde-dpmsolver++'", "1, 2"))
    if kind == "dpmsolver" and value["final_sigmas_type"] == "zero":
        found.append(("final_sigmas_type is 'zero' with 'dpmsolver'", "'sigma_min'"))
    steady = name == "UniPCMultistepScheduler" and not value["lower_order_final"]
    if steady and value["solver_order"] > 1:
        found.append(("lower_order_final is false", "true, or solver_order 1"))
    cut = (
        name == "DPMSolverMultistepScheduler"
        and settings.get("beta_schedule") == "squaredcos_cap_v2"
    )
    for field in ("use_karras_sigmas", "use_lu_lambdas"):
        if cut and value[field]:
            found.append((f"{field} is true with 'squaredcos_cap_v2', where it cuts t", "false"))
    return found


def _tau(name: str, value: Mapping[str, Any], schedule: Schedule, steps: int) -> np.ndarray:
    """τ of S steps, rounded as there."""
    T = last = schedule.num_steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= T:
        raise ValueError(f"steps (S) must be an int in 1..T = 1..{T}, got {steps!r}")
    if value.get("use_karras_sigmas") or value.get("use_lu_lambdas"):
        return timesteps(T, steps, "linspace")  # its ends alone matter
    if "lambda_min_clipped" in value:
        last = int((half_log_snr(schedule)[1:] >= value["lambda_min_clipped"]).sum())
    more = int("solver_order" in value)  # these leave out the cleanest
    spacing = value["timestep_spacing"]
    if spacing == "linspace":
        index: Any = np.linspace(0, last - 1, steps + more)[more:]
        if name == "EulerDiscreteScheduler" and not np.array_equal(index, np.rint(index)):
            raise ValueError(
                "timestep_spacing 'linspace' of EulerDiscreteScheduler calls the network at "
                f"fractions of t for S = {steps}: take S - 1 a divisor of {T - 1}, or tau=..."
            )
    elif spacing == "leading":
        index = np.arange(more, steps + more) * (last // (steps + more)) + value["steps_offset"]
    else:
        index = np.round(np.arange(last, 0, -T / steps))[::-1] - 1
    return as_timesteps(1 + np.rint(index).astype(int), T)


def _method(name: str, value: Mapping[str, Any], eta: float) -> Method:
    if name == "DDPMScheduler":
        chosen = {"fixed_large": _ddpm_large, "learned_range": ddpm("learned")}
        return chosen.get(value["variance_type"], ddpm())
    if name == "DDIMScheduler":
        return ddim(eta) if value["set_alpha_to_one"] else ddim_to_first(eta)
    if name == "PNDMScheduler":
        return pndm(not value["skip_prk_steps"], to_one=value["set_alpha_to_one"])
    spread = karras if value.get("use_karras_sigmas") else None
    spread = lu if value.get("use_lu_lambdas") and not spread else spread
    first = not spread or name == "DPMSolverMultistepScheduler"  # the others end where they are
    end = "zero" if value.get("final_sigmas_type") == "zero" else "first" if first else "same"
    if name == "EulerDiscreteScheduler":
        return solver(multistep(1), end=end)
    order, short = value["solver_order"], value["lower_order_final"]
    if name == "UniPCMultistepScheduler":
        variant = "B1" if value["solver_type"] == "bh1" else "B2"
        fill = unipc_steps(order, variant, tuple(value["disable_corrector"]))
        return solver(fill, spread=spread, end=end)
    if name == "DEISMultistepScheduler":
        how: dict[str, Any] = {"remembers": "eps", "midpoint": False, "curvature": 2.0}
        return solver(multistep(order, last=False, short=short, **how), spread=spread, end=end)
    noise = value["algorithm_type"] == "sde-dpmsolver++"
    fill = multistep(
        order,
        remembers="eps" if value["algorithm_type"] == "dpmsolver" else "x_0",
        midpoint=value["solver_type"] != "heun",
        last=end == "zero" or value["euler_at_final"],
        short=short,
        stretch=2.0 if noise else 1.0,
    )
    return solver(fill, spread=spread, end=end, noise=noise)


def _ddpm_large(schedule: Schedule, tau: Any) -> Plan:
    """σ̂ adds noise in the last step too, unless that begins at t = 1."""
    return ddpm("large", final_noise=bool(np.min(tau) > 1))(schedule, tau)


def _x0_fn(value: Mapping[str, Any]) -> Callable[[Array], Array] | None:
    if value.get("thresholding"):
        most = float(value["sample_max_value"])
        return dynamic_threshold(value["dynamic_thresholding_ratio"], most=most)
    return clip_x0(value["clip_sample_range"]) if value.get("clip_sample") else None
