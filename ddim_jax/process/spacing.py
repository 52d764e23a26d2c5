"""τ: the increasing sub-sequence of 1..T that a sampler visits, from T's end down to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ddim_jax.process.schedule import Schedule


def timesteps(
    num_steps: int,
    steps: int,
    spacing: str = "linear",
    *,
    schedule: Schedule | None = None,
    exact: bool = True,
) -> np.ndarray:
    """S strictly increasing timesteps τ₁ < … < τ_S in 1..T (DDIM §4.2 and App. D.2).

    | spacing | τ_i, i = 1..S | whose |
    |---|---|---|
    | `"linear"` | ⌊c i⌋, c = T/S | DDIM D.2 |
    | `"quadratic"` | max(i, ⌊c i²⌋), c = T/S² | DDIM D.2; `max` keeps it strictly increasing |
    | `"uniform"` | 1, 1 + r, 1 + 2r, … < T + 1, r = ⌊T/S⌋ | the authors' released code |
    | `"quad"` | 1 + ⌊u_i²⌋, u = linspace(0, √(0.8 T), S) | the authors' released code (CIFAR-10) |
    | `"leading"` | 1 + (i − 1)⌊T/S⌋ | common in other libraries |
    | `"trailing"` | round(i T/S) | common in other libraries |
    | `"linspace"` | 1 + round((i − 1)(T − 1)/(S − 1)) | common in other libraries |
    | `"logsnr"` | nearest to S even steps of log ᾱ/(1 − ᾱ) | needs `schedule` |

    Every formula is evaluated in integers or float64. `"uniform"` yields more than S steps when
    S does not divide T, and `"quad"` repeats some of its steps for large S: both are errors
    unless `exact=False` asks for what the released code visits, each step once. (A repeated step
    is the identity at η = 0.)

    Args:
      num_steps: T ≥ 1, `schedule.num_steps`.
      steps: S in 1..T, the number of network calls.
      spacing: one of the names above.
      schedule: the `Schedule`, for `"logsnr"` alone.
      exact: whether anything but exactly S steps is an error.

    Returns:
      (S,) int32, strictly increasing, in 1..T.

    Raises:
      ValueError: S is not in 1..T, the spacing is unknown, or it does not yield S distinct steps.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.timesteps(1000, 5).tolist()
      [200, 400, 600, 800, 1000]
      >>> ddim.timesteps(1000, 5, "quadratic").tolist()
      [40, 160, 360, 640, 1000]
    """
    for name, value in (("num_steps (T)", num_steps), ("steps (S)", steps)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= steps <= num_steps:
        raise ValueError(
            f"need 1 <= S <= T, got S = {steps} and T = {num_steps}: a sampler cannot visit "
            "more steps than the schedule has"
        )
    if spacing == "logsnr":
        if schedule is None:
            raise ValueError('spacing="logsnr" needs schedule=..., the Schedule that defines it')
        if schedule.num_steps != num_steps:
            raise ValueError(
                f"num_steps is {num_steps} but schedule.num_steps is {schedule.num_steps}"
            )
        tau = _log_snr(schedule, steps)
    elif spacing in _SPACINGS:
        tau = _SPACINGS[spacing](int(num_steps), int(steps))
    else:
        names = ", ".join(repr(n) for n in (*_SPACINGS, "logsnr"))
        raise ValueError(f"unknown spacing {spacing!r}; choose one of {names}")
    distinct = np.unique(tau)
    if exact and (len(distinct) != steps or len(tau) != steps):
        raise ValueError(
            f"spacing {spacing!r} yields {len(tau)} steps, {len(distinct)} of them distinct, where "
            f"S = {steps} were asked for (T = {num_steps}); pass exact=False to take the "
            f"{len(distinct)} distinct ones, or choose another spacing or S"
        )
    return as_timesteps(distinct, num_steps)


def as_timesteps(tau: Sequence[int] | np.ndarray, num_steps: int) -> np.ndarray:
    """A τ of your own, checked: strictly increasing integers in 1..T.

    Args:
      tau: (S,) integers, or whole-numbered values of any numeric dtype.
      num_steps: T.

    Returns:
      (S,) int32.

    Raises:
      ValueError: τ is empty, not a vector, not whole, unsorted, repeated, or not in 1..T.

    Example:
      >>> import ddim_jax as ddim
      >>> ddim.as_timesteps([1, 10, 100, 1000], 1000).tolist()
      [1, 10, 100, 1000]
    """
    values = np.asarray(tau)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"tau must be a non-empty vector (S,), got shape {values.shape}")
    if not (np.issubdtype(values.dtype, np.number) and np.all(values == np.floor(values))):
        raise ValueError(f"tau must hold whole numbers, got {values}")
    if values.min() < 1 or values.max() > num_steps:
        raise ValueError(
            f"tau must lie in 1..T = 1..{num_steps}, got {values.min()}..{values.max()}; "
            "add 1 to 0-based network indices, and leave out 0, where every trajectory ends"
        )
    rises = values[1:] > values[:-1]  # and not by np.diff, which wraps around where unsigned
    if not rises.all():
        i = int(np.argmin(rises))
        raise ValueError(
            f"tau must increase strictly, got {values[i]} then {values[i + 1]} at position {i + 1};"
            " pass np.unique(tau) if order and repeats do not matter to you"
        )
    return values.astype(np.int32)


def _increasing(tau: np.ndarray, num_steps: int) -> np.ndarray:
    """The closest strictly increasing integers in 1..T from below: repeats move on by one."""
    i = np.arange(1, len(tau) + 1)
    slack = np.clip(np.maximum.accumulate(tau - i), 0, num_steps - len(tau))
    return i + slack


def _quadratic(num_steps: int, steps: int) -> np.ndarray:
    i = np.arange(1, steps + 1)
    return np.maximum(i, num_steps * i**2 // steps**2)


def _quad(num_steps: int, steps: int) -> np.ndarray:
    return 1 + (np.linspace(0, np.sqrt(0.8 * num_steps), steps) ** 2).astype(int)


def _linspace(num_steps: int, steps: int) -> np.ndarray:
    if steps == 1:
        return np.array([num_steps])
    i = np.arange(steps)
    return 1 + np.rint(i * (num_steps - 1) / (steps - 1)).astype(int)


def _log_snr(schedule: Schedule, steps: int) -> np.ndarray:
    if steps == schedule.num_steps:
        return np.arange(1, steps + 1)
    log_snr = np.asarray(schedule.log_snr, np.float64)[1:]
    last = log_snr[np.isfinite(log_snr)][-1]
    grid = np.linspace(last, log_snr[0], steps)[::-1]
    nearest = 1 + np.abs(log_snr[None, :] - grid[:, None]).argmin(axis=1)
    nearest[-1] = schedule.num_steps
    return _increasing(nearest, schedule.num_steps)


_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "linear": lambda T, S: T * np.arange(1, S + 1) // S,
    "quadratic": _quadratic,
    "uniform": lambda T, S: np.arange(0, T, T // S) + 1,
    "quad": _quad,
    "leading": lambda T, S: np.arange(S) * (T // S) + 1,
    "trailing": lambda T, S: np.rint(T * np.arange(1, S + 1) / S).astype(int),
    "linspace": _linspace,
}
