"""The state dict in a checkpoint, whatever program's dicts it lies in.

| checkpoint | its parts |
|---|---|
| {"conv_in.weight": …}, all tensors | one, without a name |
| [model, optimiser, epoch, step, average], of the DDIM authors | "0", "4" |
| {"model": …, "ema": …, "opt": …} | "model", "ema" |
| {"state_dict": {"net.conv_in.weight": …, "ema.conv_in.weight": …}} | "state_dict.net", … |

A part is a dict of names and tensors. Numbers, strings and optimisers are passed over; so is a
prefix that all names share, such as "module." Nothing else is: a tensor beside the network's is
named, and left out only if `ignore` says so.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

State = dict[str, np.ndarray]
# What programs call the network itself, and its moving average; both as prefixes too.
LAST = (
    *("module", "_orig_mod", "model", "state_dict", "model_state_dict", "online_model", "net"),
    *("network", "unet", "diffusion_model", "denoise_fn", "denoiser", "eps_model", "score_model"),
    *("diffusion", "backbone", "inner_model", "_forward_module"),
)
AVERAGED = (
    *("ema", "ema_model", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model_state"),
    *("ema_model_state_dict", "ema_net", "net_ema", "ema_unet", "unet_ema", "ema_network"),
    *("averaged_model", "average_model", "ema_params", "shadow", "ema_denoiser", "ema_diffusion"),
)
KNOWN = {*LAST, *AVERAGED}
MOST = 10_000  # dicts in a checkpoint
STEPS = ("step", "global_step", "iteration", "iter", "steps")


def find_state(
    checkpoint: Any, ema: bool = True, part: str | None = None, ignore: Collection[str] = ()
) -> tuple[State, dict[str, Any]]:
    """The state dict in what `load_torch` read, or in a .safetensors file.

    Args:
      checkpoint: see the table above. Prefixes that all names share are dropped.
      ema: take the moving average, where there is one; else the weights themselves.
      part: the part to take, by its name, where these two words do not decide.
      ignore: names of tensors to leave out, the whole or the end of them from a dot on; `*` stands
        for anything. Each must be there.

    Returns:
      (flat dict of arrays, facts): which weights these are, and the step where it is known.

    Raises:
      ValueError: it holds no tensors, or several networks, or others beside the network; named.

    Example:
      >>> w, average = np.ones(2), np.zeros(2)
      >>> find_state([{"module.conv.bias": w}, {}, 3, 7000, {"conv.bias": average}])
      ({'conv.bias': array([0., 0.])}, {'weights': 'moving average', 'part': '4', 'step': 7000})
      >>> find_state({"model": {"conv.bias": w}, "ema": {"conv.bias": average}}, ema=False)
      ({'conv.bias': array([1., 1.])}, {'weights': 'last', 'part': 'model'})
    """
    step, dropped = None, set[str]()
    if isinstance(checkpoint, list | tuple):
        if len(checkpoint) not in (4, 5):
            raise ValueError(
                f"a list of {len(checkpoint)}, not [model, optimiser, epoch, step, moving average]"
            )
        named = {str(i): checkpoint[i] for i in (0, 4) if i < len(checkpoint)}
        parts = _named(p for name, v in named.items() for p in _parts(v, name, ignore, dropped))
        averaged = {"4"} & {*parts}
        step = checkpoint[3] if type(checkpoint[3]) is int else None
    else:
        parts = _named(_parts(checkpoint, "", ignore, dropped))
        averaged = {name for name in parts if _is_average(name)}
        if isinstance(checkpoint, dict):
            step = next((checkpoint[n] for n in STEPS if type(checkpoint.get(n)) is int), None)
    for pattern in ignore:
        if not any(_matches(name, pattern) for name in dropped):
            raise ValueError(f"ignore={pattern!r}, but no tensor has such a name")
    if not parts:
        raise ValueError(f"it holds {_described(checkpoint)} where a state dict belongs")
    if len(parts) == 1:  # before a word on the choice, as there may be several in it
        _check_one_network(*parts.values())
    name = _chosen(parts, averaged, ema, part)
    _check_one_network(parts[name])
    kind = "moving average" if name in averaged else "last" if len(parts) > 1 else "as stored"
    facts = {"weights": kind, "part": name, "step": step, "ignored": sorted(dropped)}
    return parts[name], {key: value for key, value in facts.items() if value not in ("", None, [])}


def leave_out(names: Collection[str]) -> str:
    """What to say so that tensors are passed over.

    Example:
      >>> leave_out(["logvar"])
      "to leave them out: ignore=('logvar',), or --ignore logvar"
    """
    short = sorted({re.sub(r"\d+", "*", name) for name in names})[:12]
    return f"to leave them out: ignore={tuple(short)}, or --ignore {shlex.join(short)}"


def _named(parts: Iterable[tuple[str, State]]) -> dict[str, State]:
    named: dict[str, State] = {}
    for name, state in parts:
        if name in named:
            raise ValueError(f"it has two parts called {name!r}")
        named[name] = state
    return named


def _parts(
    value: Any, path: str, ignore: Collection[str], dropped: set[str]
) -> Iterator[tuple[str, State]]:
    """(name, state dict) of all in a value, to a depth of four; notes what is left out."""
    todo = [(path, value)] if isinstance(value, dict) else []
    for path, value in todo:  # which grows
        state = {n: a for n, a in value.items() if isinstance(n, str) and isinstance(a, np.ndarray)}
        left_out = {name for name in state if any(_matches(name, pattern) for pattern in ignore)}
        dropped |= left_out
        state = {name: array for name, array in state.items() if name not in left_out}
        if any("." in name for name in state):  # as networks have; not one number of a callback
            yield from _networks(state, path)
        if path.count(".") < 3:
            todo += [
                (f"{path}.{name}".lstrip("."), inner)
                for name, inner in value.items()
                if isinstance(name, str) and isinstance(inner, dict)
            ]
        if len(todo) > MOST:  # by sharing, a small file can have very many
            raise ValueError(f"it has more than {MOST} dicts in dicts")


def _networks(state: State, path: str, depth: int = 0) -> Iterator[tuple[str, State]]:
    """A state dict without its prefix, or those of several in it: "net.…" and "ema_net.…"."""
    numbers = {name for name, array in state.items() if "." not in name and array.size == 1}
    heads = {name.split(".")[0] for name in state.keys() - numbers}
    if depth == 8 or not heads <= KNOWN:
        yield path, state
        return
    for head in sorted(heads):  # numbers beside them, such as "step", are an average's own
        inner = {
            n.removeprefix(f"{head}."): a for n, a in state.items() if n.startswith(f"{head}.")
        }
        name = path if len(heads) == 1 else f"{path}.{head}".lstrip(".")
        yield from _networks(inner, name, depth + 1)


def _check_one_network(state: State) -> None:
    heads = {name.split(".")[0] for name in state if "." in name} & KNOWN
    beside = sorted(name for name in state if name.split(".")[0] not in heads)
    if heads and beside:
        raise ValueError(
            f"{len(state) - len(beside)} of its tensors are named {' or '.join(sorted(heads))}.…, "
            f"and {len(beside)} lie beside: {few(beside)}; {leave_out(beside)}"
        )


def _chosen(parts: Mapping[str, State], averaged: set[str], ema: bool, part: str | None) -> str:
    there = ", ".join(f"{name!r} ({len(state)} tensors)" for name, state in parts.items())
    if part is not None:
        if part not in parts:
            raise ValueError(f"it has no part {part!r}; it has {there}")
        return part
    if not ema and len(parts) == 1:
        raise ValueError("ema=False, but it holds one set of weights only")
    wanted = averaged if ema and averaged else parts.keys() - averaged
    depth = min((name.count(".") for name in wanted), default=0)
    nearest = sorted(name for name in wanted if name.count(".") == depth)
    if len(nearest) == 1:
        return nearest[0]
    choice = (nearest or sorted(parts))[0]
    raise ValueError(
        f"it holds {there}: choose one by part={choice!r}, or --part {choice}, for example"
    )


def _is_average(path: str) -> bool:
    """By the last of its words that is known: "ema.online_model" is none."""
    for word in reversed(path.split(".")):
        if word in AVERAGED or re.search(r"(^|_)ema(_|$)|average", word.lower()):
            return True
        if word in LAST:
            return False
    return False


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _described(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    inside = [f"{name!r} ({type(item).__name__})" for name, item in value.items()]
    return f"a dict of {few(inside) or 'nothing'}"


def few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
