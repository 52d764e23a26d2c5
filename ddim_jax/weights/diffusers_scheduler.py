"""The scheduler_config.json of the diffusers library in our words, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddim_jax.process.schedule import ScheduleConfig

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler")
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}


def schedule_config(scheduler: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The noise schedule and the prediction type of a scheduler_config.json.

    Args:
      scheduler: its content. What is not in it has diffusers' default.

    Returns:
      (ScheduleConfig, "eps", "x_0" or "v").

    Raises:
      ValueError: naming the setting that is not supported.

    Example:
      >>> config, predicts = schedule_config({"_class_name": "DDPMScheduler"})
      >>> config == ScheduleConfig("linear", 1000), predicts
      (True, 'eps')
    """

    def refuse(field: str, known: object) -> ValueError:
        value = scheduler.get(field)
        return ValueError(f"{field} is {value!r} in scheduler_config.json, supported: {known}")

    if scheduler.get("_class_name") not in SCHEDULERS:
        raise refuse("_class_name", ", ".join(SCHEDULERS))
    if scheduler.get("trained_betas") is not None:
        raise refuse("trained_betas", None)
    zero = scheduler.get("rescale_betas_zero_snr", False)
    if type(zero) is not bool:
        raise refuse("rescale_betas_zero_snr", "true and false")
    if "learned" in str(scheduler.get("variance_type")):
        raise refuse("variance_type", "a fixed variance")
    steps = scheduler.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= 1_000_000:
        raise refuse("num_train_timesteps", "an int in 1..1000000")
    for field in ("beta_start", "beta_end"):
        if not isinstance(scheduler.get(field, 0.5), int | float):
            raise refuse(field, "a number")
    betas = scheduler.get("beta_schedule", "linear")
    if not isinstance(betas, str) or betas not in KINDS:
        raise refuse("beta_schedule", ", ".join(KINDS))
    default = "epsilon" if scheduler.get("predict_epsilon", True) else "sample"
    prediction = scheduler.get("prediction_type", default)
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise refuse("prediction_type", ", ".join(PREDICTIONS))
    facts = {"kind": KINDS[betas], "num_steps": steps}
    if facts["kind"] != "cosine":  # diffusers' defaults are those of linear for both other kinds
        start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
        facts |= {"beta_start": float(start), "beta_end": float(end)}
    config = ScheduleConfig.from_facts(facts | ({"zero_terminal_snr": True} if zero else {}))
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
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
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
        "prediction_type": predictions[prediction],
        **({"rescale_betas_zero_snr": True} if schedule.zero_terminal_snr else {}),
    }
