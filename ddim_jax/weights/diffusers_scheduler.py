"""The scheduler_config.json of the diffusers library: its schedule in our words, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.process.schedule_config import ScheduleConfig

KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
LINEAR, LATENT = ("linear", 1e-4, 0.02), ("linear", 0.00085, 0.012)
# Class → its default kind, β₁ and β_T. All of these train on the same forward process.
SCHEDULERS = {
    **dict.fromkeys(
        (
            *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"),
            *("UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler"),
            *("DDPMParallelScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"),
            *("DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler"),
            *("EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler"),
        ),
        LINEAR,
    ),
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        LATENT,
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("scaled_linear", *LATENT[1:])),
}
ZERO_SNR = {  # those that have rescale_betas_zero_snr; the others pass it over
    *("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"),
    *("DDIMInverseScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
}
PIPELINES = {"DDIMPipeline": 50, "DDPMPipeline": 1000, "PNDMPipeline": 50}  # their default S
OF_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "predict_epsilon", "rescale_betas_zero_snr"),
)
SIGMOID = ("DDPMScheduler", "DDPMParallelScheduler")


def schedule_config(scheduler: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The noise schedule and the prediction type of a scheduler_config.json.

    How it would sample is not looked at here: `recipe` of `diffusers_recipe` does.

    Args:
      scheduler: its content. What is not in it has diffusers' default.

    Returns:
      (ScheduleConfig, "eps", "x_0" or "v").

    Raises:
      ValueError: naming the settings that are not supported, and what would do.

    Example:
      >>> config, predicts = schedule_config({"_class_name": "DDPMScheduler"})
      >>> config == ScheduleConfig("linear", 1000), predicts
      (True, 'eps')
    """
    name = str(scheduler.get("_class_name"))
    if name not in SCHEDULERS:
        refuse([(f"_class_name is {name!r}", ", ".join(SCHEDULERS))])
    problems = list[tuple[str, str]]()

    def get(field: str, default: Any, ok: Any, wanted: str) -> Any:
        value = scheduler.get(field, default)
        if not ok(value):
            problems.append((f"{field} is {value!r}", wanted))
        return value

    kind, start, end = SCHEDULERS[name]
    kinds = (*KINDS, "sigmoid") if name in SIGMOID else tuple(KINDS)
    kind = get("beta_schedule", kind, lambda v: v in kinds, ", ".join(kinds))
    start = get("beta_start", start, _real, "a number")
    end = get("beta_end", end, _real, "a number")
    fits = lambda v: type(v) is int and 1 <= v <= 1_000_000  # noqa: E731
    steps = get("num_train_timesteps", 1000, fits, "an int in 1..1000000")
    zero = scheduler.get("rescale_betas_zero_snr", False) if name in ZERO_SNR else False
    if type(zero) is not bool:
        problems.append((f"rescale_betas_zero_snr is {zero!r}", "true or false"))
    fits = lambda v: v is None or _betas(v, steps)  # noqa: E731
    betas = get("trained_betas", None, fits, f"a list of {steps} numbers, one for each t")
    default = "epsilon" if scheduler.get("predict_epsilon", True) else "sample"
    known = lambda v: isinstance(v, str) and v in PREDICTIONS  # noqa: E731
    prediction = get("prediction_type", default, known, ", ".join(PREDICTIONS))
    refuse(problems)
    facts: dict[str, Any] = {"num_steps": steps, "zero_terminal_snr": zero}
    if betas is None and kind == "sigmoid":
        betas = (1 / (1 + np.exp(-np.linspace(-6, 6, steps))) * (end - start) + start).tolist()
    if betas is not None:
        facts |= {"kind": "betas", "given": betas}
    elif kind == "squaredcos_cap_v2":
        facts |= {"kind": "cosine"}
    else:
        facts |= {"kind": kind, "beta_start": float(start), "beta_end": float(end)}
    config = ScheduleConfig.from_facts(facts)
    config.build()
    return config, PREDICTIONS[prediction]


def scheduler_settings(schedule: ScheduleConfig, prediction: str) -> dict[str, Any]:
    """What a scheduler_config.json says of the model: `schedule_config` undone.

    Args:
      schedule: the noise schedule.
      prediction: "eps", "x_0" or "v".

    Returns:
      A JSON-able dict.

    Example:
      >>> schedule = ScheduleConfig("scaled_linear")
      >>> settings = {"_class_name": "DDIMScheduler"} | scheduler_settings(schedule, "v")
      >>> schedule_config(settings) == (schedule, "v")
      True
    """
    kinds = {ours: theirs for theirs, ours in KINDS.items()} | {"betas": "linear"}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    facts = schedule.facts()
    if prediction not in predictions:
        raise ValueError(
            f"diffusers has no prediction type {prediction!r}; it has those of "
            f"{', '.join(predictions)}"
        )
    factor = 1000 / schedule.num_steps if schedule.rescale_betas else 1
    return {
        "num_train_timesteps": schedule.num_steps,
        "beta_schedule": kinds[schedule.kind],
        "beta_start": facts["beta_start"] * factor,
        "beta_end": facts["beta_end"] * factor,
        "trained_betas": facts.get("given"),
        "prediction_type": predictions[prediction],
        **({"rescale_betas_zero_snr": True} if schedule.zero_terminal_snr else {}),
    }


def sampling_facts(scheduler: Mapping[str, Any], pipeline: str | None = None) -> dict[str, Any]:
    """What a model keeps of a scheduler_config.json: all but its β, which the schedule has.

    Args:
      scheduler: its content.
      pipeline: the class in model_index.json, kept as `_pipeline`.

    Example:
      >>> sampling_facts({"_class_name": "DDPMScheduler", "beta_end": 0.02}, "DDPMPipeline")
      {'_class_name': 'DDPMScheduler', '_pipeline': 'DDPMPipeline'}
    """
    kept = {n: v for n, v in scheduler.items() if n not in OF_SCHEDULE or n == "beta_schedule"}
    if kept.get("lambda_min_clipped") == -math.inf:  # its default, and no JSON
        del kept["lambda_min_clipped"]
    kept = {n: str(v) if _is_infinite(v) else v for n, v in kept.items()}
    return kept | ({} if pipeline is None else {"_pipeline": pipeline})


def whole_scheduler(
    sampling: Mapping[str, Any] | None, schedule: ScheduleConfig, prediction: str
) -> tuple[str, dict[str, Any]]:
    """A scheduler_config.json for a model, and the pipeline that goes with it.

    Args:
      sampling: of `sampling_facts`; None for our default, DDIM without clipping.
      schedule, prediction: as in `scheduler_settings`.

    Returns:
      ("DDIMPipeline" or another, a JSON-able dict).

    Raises:
      ValueError: diffusers has no such prediction type, or that scheduler no zero terminal SNR.

    Example:
      >>> pipeline, settings = whole_scheduler(None, ScheduleConfig(), "eps")
      >>> pipeline, settings["_class_name"], settings["clip_sample"]
      ('DDIMPipeline', 'DDIMScheduler', False)
    """
    ours = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}
    told = sampling if isinstance(sampling, Mapping) else {"steps_offset": 0, **ours}
    kept = {n: v for n, v in told.items() if n not in (*OF_SCHEDULE, "_pipeline")}
    kind = str(kept.get("_class_name", "DDIMScheduler"))
    if schedule.zero_terminal_snr and kind not in ZERO_SNR:
        raise ValueError(f"{kind} of diffusers has no zero terminal SNR; DDIMScheduler has")
    pipeline = told.get("_pipeline")
    if pipeline not in PIPELINES:
        pipeline = kind.replace("Scheduler", "Pipeline")
        pipeline = pipeline if pipeline in PIPELINES else "DDPMPipeline"  # takes any scheduler
    return pipeline, {"_class_name": kind, **kept, **scheduler_settings(schedule, prediction)}


def refuse(problems: list[tuple[str, str]], advice: str = "") -> None:
    """Raises one ValueError with all (what is wrong, what would do), if there are any.

    Example:
      >>> refuse([("solver_order is 7", "1, 2, 3"), ("eta_max is unknown", "")])
      Traceback (most recent call last):
      ValueError: scheduler_config.json: solver_order is 7 (read are: 1, 2, 3); eta_max is unknown
    """
    if problems:
        lines = (what + (f" (read are: {would})" if would else "") for what, would in problems)
        raise ValueError(f"scheduler_config.json: {'; '.join(lines)}{advice}")


def _real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _betas(value: Any, steps: int) -> bool:
    return isinstance(value, list) and len(value) == steps and all(map(_real, value))
