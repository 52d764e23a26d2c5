"""Which classes are drawn, and how strongly: words and numbers, checked against a model."""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ddim_jax.weights import Model

Labels: TypeAlias = int | str | Sequence[int | str] | None
listed = reprlib.Repr()
listed.maxlist = 20  # names of classes in an error


class Condition(NamedTuple):
    """Classes and guidance of a run of images, checked."""

    labels: tuple[int, ...] | None = None  # image k has the k-th in turn; K means none
    guidance: float | None = None  # w; None is labels alone
    interval: tuple[int, int] | None = None  # guided where lo ≤ t ≤ hi; None is everywhere

    def of(self, numbers: np.ndarray) -> np.ndarray | None:
        """The classes (n,) int32 of the images of these numbers, None where there are none.

        Example:
          >>> Condition((4, 7)).of(np.array([0, 1, 5])).tolist()
          [4, 7, 7]
        """
        if self.labels is None:
            return None
        return np.array(self.labels, np.int32)[numbers % len(self.labels)]


def condition(
    model: Model,
    labels: Labels = None,
    guidance: float | None = None,
    interval: tuple[int, int] | None = None,
) -> Condition:
    """Labels and guidance as `generate` takes them, checked against a model of K classes.

    Args:
      model: see `load_model`.
      labels: a class for all images, or several in turn, such that image k has the k-th modulo
        their number: numbers in 0..K − 1, names that the model knows, or "none" (K); "all" for all
        K in turn; None for no class, as "none" is.
      guidance: w, finite: 0 is without class, 1 is conditional, more is guided.
      interval: (lo, hi) in t, 1 ≤ lo ≤ hi ≤ T.

    Returns:
      A `Condition`; of a model without classes it is empty.

    Raises:
      ValueError: the model has no classes, or none of that name or number; there is nothing to
        guide; the interval is reversed or leaves 1..T.
      TypeError: labels or interval are no such things.

    Example:
      >>> import ddim_jax as ddim
      >>> condition(ddim.load_model("digits-labels"), ["3", 7], 2.0)
      Condition(labels=(3, 7), guidance=2.0, interval=None)
    """
    num_classes = model.config.num_classes
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if num_classes is None and (labels, guidance, interval) != (None, None, None):
        asked = {"labels": labels, "guidance": guidance, "guidance_interval": interval}
        given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
        raise ValueError(f"the model has no classes: labels and guidance must be None, got {given}")
    check_none(model, guidance is not None)
    if labels is None and guidance is not None:
        raise ValueError("guidance is towards a class: give labels (--label, --labels) too")
    if interval is not None:
        if guidance is None:
            raise ValueError("an interval is for guidance: give guidance (--guidance) too")
        interval = _interval(interval, model.schedule.num_steps)
    if labels is None and _has_none(model):
        _warn_of_none(model)
        return Condition()
    numbers = () if labels is None else class_numbers(labels, num_classes, model.label_names)
    if not _has_none(model) and (labels is None or num_classes in numbers):
        raise ValueError(
            f"the model has {num_classes} classes and no row for none of them: give labels in "
            f"0..{num_classes - 1}, or 'all' (--label, --labels)"
        )
    return Condition(
        numbers,
        None if guidance is None else float(guidance),
        interval,
    )


def check_none(model: Model, guidance: bool) -> None:
    """Raises ValueError where a network's labels are no classes, or guidance has nothing to leave.

    Example:
      >>> import ddim_jax as ddim
      >>> check_none(ddim.load_model("digits-labels"), guidance=True)
    """
    kind = getattr(model.config, "class_embedding", "table")
    if kind != "table":
        raise ValueError(
            f"the labels of this network are no classes (class_embedding={kind!r}): give them by "
            "hand, ddim.sample(partial(model.apply_fn, model.params, labels=...), ...)"
        )
    if guidance and not _has_none(model):
        raise ValueError(
            "guidance leads away from images without a class, of which this network knows none "
            "(null_label=False): leave it out (of an exported sampler, --no-guidance)"
        )


def _has_none(model: Model) -> bool:
    """Whether its label K means none, as it does but for networks of others."""
    return getattr(model.config, "num_classes", None) is None or model.config.null_label


def name_of(model: Model, label: int) -> str:
    """What the class is called: its name, its number where it has none, or "none".

    No class is called by its number K where "none" is the name of one.

    Example:
      >>> import ddim_jax as ddim
      >>> name_of(ddim.load_model("digits-labels"), 10)
      'none'
    """
    names = model.label_names
    if label == model.config.num_classes:
        return "none" if "none" not in (names or ()) else str(label)
    return str(label) if names is None else names[label]


def class_numbers(
    labels: Any, num_classes: int, names: Sequence[str] | None = None
) -> tuple[int, ...]:
    """The numbers of the classes that are asked for, as `condition` says; "none" is num_classes.

    Example:
      >>> class_numbers(["dog", 0, "none"], 2, ["cat", "dog"]), class_numbers("all", 2)
      ((1, 0, 2), (0, 1))
    """
    names = names or ()
    if isinstance(labels, str) and labels == "all" and "all" not in names:
        return tuple(range(num_classes))
    several = [labels] if isinstance(labels, str) or np.ndim(labels) == 0 else list(labels)
    if not several:
        raise ValueError("labels must name at least one class, got an empty list")
    return tuple(_class_number(label, num_classes, names) for label in several)


def _class_number(label: Any, count: int, names: Sequence[str]) -> int:
    """The number of one class: a name goes before a number."""
    known = f"a class in 0..{count - 1}, {count} or 'none' for none, or 'all'"
    known += f", or one of its names {listed.repr(list(names))}" if names else ""
    if isinstance(label, str):
        if label in names:
            return list(names).index(label)
        if label == "none":
            return count
        if not label.isascii() or not label.lstrip("-").isdigit():
            close = difflib.get_close_matches(label, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            more = "" if names else ", and the names of its classes are not stored with it"
            raise ValueError(f"unknown class {label!r}{hint}: labels must be {known}{more}")
        label = int(label)
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        raise TypeError(f"labels must be {known}, got {label!r}")
    if not 0 <= operator.index(label) <= count:
        raise ValueError(f"labels must be {known}, got {label}")
    return operator.index(label)


def _interval(interval: Any, num_steps: int) -> tuple[int, int]:
    try:
        low, high = (operator.index(t) for t in interval)
    except (TypeError, ValueError):
        raise TypeError(
            f"the guidance interval must be (lo, hi), two whole numbers in 1..{num_steps}, got "
            f"{interval!r}"
        ) from None
    if not 1 <= low <= high <= num_steps:
        raise ValueError(
            f"the guidance interval (lo, hi) must have 1 <= lo <= hi <= T = {num_steps}, got "
            f"({low}, {high})"
        )
    return low, high


def _warn_of_none(model: Model) -> None:
    """Of a model that may never have seen an image without its class."""
    train = model.facts.get("train", {})
    if model.config.num_classes is not None and not train.get("label_dropout"):
        warnings.warn(
            f"the model has {model.config.num_classes} classes, does not say that it learned to "
            "draw without any, and is asked for none: choose labels=0, …, or 'all' (--label, "
            "--labels)",
            stacklevel=4,
        )
