"""Where the time of the GPU goes: a step of training and a sampler, by kind of operation.

    python -m experiments.benchmarks.profile [--preset cifar10] [--batch 128] [--json FILE]

A trace of `jax.profiler`, read by this script: each kernel is looked up in the compiled program by
the name of its operation, and counted by what was fused into it. "gaps" is the time between the
first and the last kernel in which none runs. One kind takes what is fused of several: a convolution
before a normalisation, that before what is element-wise.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.networks.flops import count_flops
from ddim_jax.networks.unet import build
from ddim_jax.storage.files import write_whole
from ddim_jax.training import parallel
from ddim_jax.training.presets import PRESETS
from ddim_jax.training.step import init_state, make_train_step

# kind → what the name of a kernel, or of an operation fused into it, says; the first that fits.
KINDS = {
    "collective": r"all-reduce|all-gather|reduce-scatter|nccl",
    "convolution, product": r"conv_general_dilated|dot_general|convolution|__cudnn\$conv|fprop|"
    r"dgrad|wgrad|gemm|xmma|cutlass|implicit|sm90_|cublas|fmha|attention",
    "optimiser, average": r"/(adam|optax|clip|ema|mul_optimizer)|scale_by_adam|apply_updates",
    "normalisation": r"norm[12]|norm_out|/norm/|GroupNorm|rsqrt",
    "softmax": r"softmax|reduce_max",
    "concatenation": r"concatenate",
    "random numbers": r"threefry|random_bits|erf_inv|rng",
    "copy, layout": r"copy|transpose|memcpy|nchwToNhwc|nhwcToNchw|bitcast",
}
OTHER = "element-wise and other"


class Kernel(NamedTuple):
    """One kernel of the trace, all its runs together."""

    name: str  # of the kernel
    operation: str  # of the program
    seconds: float
    count: int


def fused_names(program: str) -> dict[str, str]:
    """Operation → the names, of the source, of all that is computed in it, from a program's text.

    Example:
      >>> text = '''
      ... %fused (p: f32[2]) -> f32[2] {
      ...   ROOT %m = f32[2] multiply(%p, %p), metadata={op_name="jit(f)/norm1/mul"}
      ... }
      ... ENTRY %main {
      ...   %loop_fusion.3 = f32[2] fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="y"}
      ... }'''
      >>> fused_names(text)["loop_fusion.3"]
      'fusion y jit(f)/norm1/mul'
    """
    inside: dict[str, list[str]] = collections.defaultdict(list)
    found, calls, computation = {}, {}, ""
    for line in program.splitlines():
        if head := re.match(r"\s*(?:ENTRY )?%?([\w.\-$]+)[^=]*\{\s*$", line):
            computation = head[1]
        if one := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*?\b([a-z][\w\-]*)\(", line):
            target = re.search(r'custom_call_target="([^"]+)"', line)
            named = re.search(r'op_name="([^"]+)"', line)
            words = [one[2], *(m[1] for m in (target, named) if m)]
            found[one[1]] = " ".join(words)
            inside[computation].append(" ".join(words[1:]))
            if called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                calls[one[1]] = called[1]
    return {
        name: " ".join([words, *inside.get(calls.get(name, ""), [])])
        for name, words in found.items()
    }


def kind_of(kernel: Kernel, names: Mapping[str, str]) -> str:
    """Which of `KINDS` a kernel is.

    Example:
      >>> kind_of(Kernel("loop_fusion_3", "loop_fusion.3", 1e-3, 1), {"loop_fusion.3": "norm1/mul"})
      'normalisation'
    """
    words = f"{kernel.name} {kernel.operation} {names.get(kernel.operation, '')}"
    return next((kind for kind, says in KINDS.items() if re.search(says, words)), OTHER)


def record(
    call: Callable[[], Any], rounds: int, keep: pathlib.Path | None
) -> tuple[list[Kernel], float, float]:
    """The kernels of so many calls on the first device, their span, the gaps in it (seconds)."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                result = call()
            jax.block_until_ready(result)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        if keep:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep)
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
    device = next((p for p in planes if p.name.startswith("/device:GPU:0")), None)
    if device is None:
        raise SystemExit("profile needs a GPU: the trace of this machine holds no device's kernels")
    total: dict[tuple[str, str], list[float]] = {}
    spans = []
    for line in device.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            one = total.setdefault((event.name, str(stats.get("hlo_op", ""))), [0.0, 0])
            one[0] += event.duration_ns / 1e9
            one[1] += 1
            spans.append((event.start_ns, event.start_ns + event.duration_ns))
    busy, end = 0.0, 0.0
    for begin, finish in sorted(spans):
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    span = end - min(begin for begin, _ in spans)
    kernels = [Kernel(*key, seconds, int(count)) for key, (seconds, count) in total.items()]
    return sorted(kernels, key=lambda k: -k.seconds), span / 1e9, (span - busy) / 1e9


def table(title: str, found: tuple[list[Kernel], float, float], program: str, flops: float,
          rounds: int) -> dict[str, Any]:  # fmt: skip
    """Prints the kinds, most first; returns them with the fifty dearest kernels."""
    kernels, span, gaps = found
    names = fused_names(program)
    kinds: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        kinds[kind_of(kernel, names)] += kernel.seconds
    kinds["gaps"] = gaps
    print(f"\n{title}: {1e3 * span / rounds:.2f} ms, {flops * rounds / span / 1e12:.0f} TFLOP/s")
    print("| kind | ms | share |\n|---|---|---|")
    for kind, seconds in kinds.most_common():
        print(f"| {kind} | {1e3 * seconds / rounds:.2f} | {seconds / span:.1%} |")
    return {
        "title": title,
        "ms": 1e3 * span / rounds,
        "flops": flops,
        "kinds": {kind: 1e3 * seconds / rounds for kind, seconds in kinds.most_common()},
        "kernels": [
            {**k._asdict(), "kind": kind_of(k, names), "what": names.get(k.operation, "")[:400]}
            for k in kernels[:50]
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Profiles a train step and a sampler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10", choices=PRESETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--programs", type=pathlib.Path, help="a folder for programs and traces")
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]()
    network = dataclasses.replace(preset.model, dtype=args.dtype)
    apply_fn, params = build(network, jax.random.key(0))
    schedule, shape = preset.schedule.build(), network.image_shape
    results = []
    for batch in args.batch:
        train = dataclasses.replace(preset.train, batch_size=batch)
        step = make_train_step(apply_fn, schedule, train, network.num_classes)
        images = {"image": jnp.zeros((batch, *shape), jnp.uint8), "label": jnp.zeros(batch, int)}
        state = init_state(params, train)
        x, t = jnp.zeros((batch, *shape)), jnp.ones(batch, int)
        labels = {} if network.num_classes is None else {"labels": t}

        def kept(name: str, batch: int = batch) -> pathlib.Path | None:
            return args.programs and args.programs / f"{name}-{batch}.xplane.pb"

        forward = count_flops(apply_fn, params, x, t, **labels)
        compiled = step.lower(state, images).compile()

        def update(compiled: Any = compiled, images: Any = images) -> Any:
            nonlocal state
            state, metrics = compiled(state, images)
            return metrics

        title = f"train step, {args.preset}, batch {batch}, {args.dtype}"
        program = compiled.as_text()
        results.append(
            table(
                title, record(update, args.rounds, kept("step")), program, 3 * forward, args.rounds
            )
        )
        plan = ddim.ddim(0.0)(schedule, ddim.timesteps(schedule.num_steps, args.steps))
        draw = jax.jit(
            lambda params, x, plan, labels=labels: _run(apply_fn, params, x, plan, labels)
        )
        drawing = draw.lower(params, x, plan).compile()
        title = f"sample, {args.preset}, batch {batch}, S = {args.steps}, {args.dtype}"
        found = record(lambda x=x, plan=plan, drawing=drawing: drawing(params, x, plan),
                       args.rounds, kept("sample"))  # fmt: skip
        work = args.steps * forward
        results.append(table(title, found, drawing.as_text(), work, args.rounds))
        if args.programs:
            (args.programs / f"step-{batch}.txt").write_text(program)
            (args.programs / f"sample-{batch}.txt").write_text(drawing.as_text())
    kind = jax.devices()[0].device_kind
    peak = parallel.peak_flops(kind)
    print(f"\n{kind}, jax {jax.__version__}; peak {(peak or 0) / 1e12:.0f} TFLOP/s")
    if args.json:
        facts = {"device": kind, "jax": jax.__version__, "tables": results}
        write_whole(args.json, json.dumps(facts, indent=1).encode())


def _run(apply_fn: Any, params: Any, x: jax.Array, plan: Any, labels: dict[str, Any]) -> jax.Array:
    from ddim_jax.sampling.plan import run

    inputs = {name: jnp.zeros_like(value) for name, value in labels.items()}
    return run(lambda x, t: apply_fn(params, x, t, **inputs), x, plan)[0]


if __name__ == "__main__":
    np.set_printoptions(precision=3)
    main()
