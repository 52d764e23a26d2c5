"""One side of one race, in a process of its own: its memory, its flags, its compiling.

Started by `racing`, with a JSON object as its one word. Answers each line of its input with one of
JSON: "prepare" compiles and calls thrice, "go" measures one call, after another that is not
measured, "end" tells the memory. What anything else prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from experiments.benchmarks import peers, sampling, training


def make(spec: dict[str, Any]) -> peers.Call:
    """The call of a side; where `figures` is asked for, it returns all that is to be known."""
    if spec["what"] == "limits":
        return peers.limits(spec["side"], spec["dtype"], spec["small"])
    if spec["what"] == "fit":
        from experiments.benchmarks import train_loop

        return train_loop.prepare(train_loop.Settings(**spec["settings"]))
    return (sampling if spec["what"] == "sampling" else training).side(spec)


def facts(side: str) -> dict[str, Any]:
    """What computes here."""
    if not peers.is_ours(side):
        import torch

        return {"version": torch.__version__}
    import jax

    from experiments.provenance import device

    return device() | {"version": jax.__version__}


def as_array(result: Any) -> np.ndarray:
    """Of either library."""
    return result.float().cpu().numpy() if hasattr(result, "cpu") else np.asarray(result, "f4")


def prepared(spec: dict[str, Any]) -> tuple[peers.Call, dict[str, Any]]:
    """The call, compiled, and how long that took."""
    began = time.perf_counter()
    call = make(spec)
    if spec.get("figures"):
        return call, {"prepare_seconds": time.perf_counter() - began}
    result = call()
    found = {"first": time.time(), "prepare_seconds": time.perf_counter() - began}
    if spec["what"] in ("sampling", training.FORWARD):
        np.save(spec["output"], as_array(result))
    del result
    for _ in range(2):  # CUDA graphs are recorded in the second call
        call()
    return call, found


def main() -> None:
    """Until the input ends."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if not peers.is_ours(spec["side"]):
        import torch  # noqa: F401

        if spec["what"] != "limits":
            from diffusers import DDIMPipeline  # noqa: F401
    before, call = peers.resident(), None
    answers.write(json.dumps(facts(spec["side"])) + "\n")
    answers.flush()
    for line in sys.stdin:
        word = line.strip()
        if word == "prepare":
            call, answer = prepared(spec)
        elif word == "go" and spec.get("figures"):
            answer = {"figures": call()}
        elif word == "go":
            call()
            answer = {"seconds": peers.seconds(call) / spec.get("repeats", 1)}
        else:
            answer = {"memory_mb": peers.peak_memory(spec["side"], before)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
