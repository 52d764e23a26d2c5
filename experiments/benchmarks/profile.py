"""Where the time of the GPU goes: a step of training and a sampler, by kind of operation.

    python -m experiments.benchmarks.profile [--preset cifar10] [--batch 128] [--json FILE]

A trace of `jax.profiler`, read by this script: each kernel is looked up in the compiled program by
the name of its operation, and counted by what was fused into it. "gaps" is the time between the
first and the last kernel in which none runs. One kind takes what is fused of several, the first in
the order of `KINDS`.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ddim_jax as ddim
from ddim_jax.networks.flops import count_flops
from ddim_jax.networks.unet import build
from ddim_jax.sampling.plan import Plan
from ddim_jax.sampling.plan import run as run_plan
from ddim_jax.storage.files import write_whole
from ddim_jax.training import averages, feeding, parallel
from ddim_jax.training.presets import PRESETS, Preset
from ddim_jax.training.step import DENOISING, init_state, make_train_step

# kind → what the name of a kernel, or of an operation fused into it, says; the first that fits.
KINDS = {
    "collective": r"all-reduce|all-gather|reduce-scatter|nccl",
    "attention": r"/attention/|fmha",
    "convolution, product": r"conv_general_dilated|dot_general|__cudnn\$conv|fprop|dgrad|wgrad|"
    r"gemm|xmma|cutlass|cublas",
    "optimiser, average": r"/optimiser/",
    "normalisation, activation": r"/group_norm/",
    "concatenation": r"concatenate",
    "random numbers": r"threefry|random_bits|erf_inv|rng",
    "copy, layout": r"copy|transpose|memcpy|memset|nchwToNhwc|nhwcToNchw",
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
      ...   ROOT %m = f32[2] multiply(%p, %p), metadata={op_name="jit(f)/group_norm/mul"}
      ... }
      ... ENTRY %main {
      ...   %loop_fusion.3 = f32[2] fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="y"}
      ... }'''
      >>> fused_names(text)["loop_fusion_3"]
      'fusion y jit(f)/group_norm/mul'
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
        kernel_name(name): " ".join([words, *inside.get(calls.get(name, ""), [])])
        for name, words in found.items()
    }


def kernel_name(operation: str) -> str:
    """What XLA calls the kernel of a fusion: fusion.3 is fusion_3."""
    return re.sub(r"[.\-]", "_", operation)


def says(kernel: Kernel, names: Mapping[str, str]) -> str:
    """All that is known of a kernel; in a command buffer its own name alone tells which it is."""
    own = names.get(kernel_name(kernel.name)) or names.get(kernel_name(kernel.operation), "")
    return f"{kernel.name} {own}"


def kind_of(kernel: Kernel, names: Mapping[str, str]) -> str:
    """Which of `KINDS` a kernel is.

    Example:
      >>> kernel = Kernel("loop_fusion_3", "command_buffer_1", 1e-3, 1)
      >>> kind_of(kernel, {"loop_fusion_3": "fusion jit(f)/group_norm/mul"})
      'normalisation, activation'
    """
    words = says(kernel, names)
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


class Subject(NamedTuple):
    """What is profiled."""

    name: str
    call: Callable[[], Any]
    program: str  # the compiled one's text
    flops: float  # of a call
    parts: int  # of a call: steps, say


def subjects(preset: Preset, batch: int, steps: int, rounds: int) -> Iterator[Subject]:
    """A train step alone, `rounds` of them in one call as `fit` makes them, and a sampler."""
    network, classes = preset.model, preset.model.num_classes
    apply_fn, params = build(network, jax.random.key(0))
    schedule, shape = preset.schedule.build(), (batch, *network.image_shape)
    x, t = jnp.zeros(shape), jnp.ones(batch, int)
    labels = {} if classes is None else {"labels": t}
    forward = count_flops(apply_fn, params, x, t, **labels)
    train = dataclasses.replace(preset.train, batch_size=batch)
    step = make_train_step(apply_fn, schedule, train, classes)
    images = {"image": jnp.zeros(shape, jnp.uint8), "label": t}
    many = jax.tree.map(lambda v: jnp.stack([v] * rounds), images)
    run = feeding.make_steps(step, parallel.make_mesh(devices=jax.devices()[:1]), averages.leave)
    both = (step.lower(init_state(params, train), images).compile(),
            run.lower(init_state(params, train), [], {}, many, DENOISING).compile())  # fmt: skip
    state = init_state(params, train)

    def alone() -> Any:
        nonlocal state
        state, metrics = both[0](state, images)
        return metrics

    def together() -> Any:
        nonlocal state
        state, _, metrics = both[1](state, [], {}, many, DENOISING)
        return metrics

    yield Subject("a train step", alone, both[0].as_text(), 3 * forward, 1)
    name, work = f"{rounds} train steps in a call", 3 * forward * rounds
    yield Subject(name, together, both[1].as_text(), work, rounds)
    plan = ddim.ddim(0.0)(schedule, ddim.timesteps(schedule.num_steps, steps))

    @jax.jit
    def draw(params: Any, x: jax.Array, plan: Plan) -> jax.Array:
        return run_plan(partial(apply_fn, params, **labels), x, plan)[0]

    drawing = draw.lower(params, x, plan).compile()
    name = f"sample, S = {steps}"
    yield Subject(name, lambda: drawing(params, x, plan), drawing.as_text(), steps * forward, steps)


def table(
    subject: Subject, title: str, rounds: int, keep: pathlib.Path | None, before: dict[str, Any]
) -> dict[str, Any]:
    """Prints the kinds, most first, beside an earlier table's; with the fifty dearest kernels."""
    kernels, span, gaps = record(subject.call, rounds, keep and keep.with_suffix(".xplane.pb"))
    if keep:
        write_whole(keep.with_suffix(".hlo.txt"), subject.program.encode())
    names, each = fused_names(subject.program), 1e3 / (rounds * subject.parts)
    kinds: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        kinds[kind_of(kernel, names)] += kernel.seconds
    kinds["gaps"] = gaps
    speed = subject.flops * rounds / span
    then = f" (before: {before['ms']:.2f} ms)" if before else ""
    print(f"\n{title}: {each * span:.2f} ms each{then}, {speed / 1e12:.0f} TFLOP/s\n")
    print("| kind | ms | share |" + " before |" * bool(before))
    print("|---|---|---|" + "---|" * bool(before))
    for kind, seconds in kinds.most_common():
        then = f" {before.get('kinds', {}).get(kind, 0.0):.2f} |" if before else ""
        print(f"| {kind} | {each * seconds:.2f} | {seconds / span:.1%} |{then}")
    return {
        "title": title,
        "ms": each * span,
        "flops_per_second": speed,
        "kinds": {kind: each * seconds for kind, seconds in kinds.most_common()},
        "kernels": [
            {**k._asdict(), "kind": kind_of(k, names), "what": says(k, names)[:400]}
            for k in kernels[:50]
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Profiles training and a sampler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10", choices=PRESETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--before", type=pathlib.Path, help="an earlier --json, to set beside it")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for traces and programs")
    args = parser.parse_args(argv)
    old = json.loads(args.before.read_text())["tables"] if args.before else []
    earlier = {one["title"]: one for one in old}
    preset = PRESETS[args.preset]()
    preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, dtype=args.dtype))
    results = []
    for batch in args.batch:
        for subject in subjects(preset, batch, args.steps, args.rounds):
            title = f"{subject.name}, {args.preset}, batch {batch}, {args.dtype}"
            keep = args.keep and args.keep / re.sub(r"\W+", "-", title)
            rounds = 1 if subject.parts == args.rounds else args.rounds
            results.append(table(subject, title, rounds, keep, earlier.get(title, {})))
    kind = jax.devices()[0].device_kind
    peak = parallel.peak_flops(kind)
    print(f"\n{kind}, jax {jax.__version__}; peak {(peak or 0) / 1e12:.0f} TFLOP/s")
    if args.json:
        facts = {"device": kind, "jax": jax.__version__, "tables": results}
        write_whole(args.json, json.dumps(facts, indent=1).encode())


if __name__ == "__main__":
    main()
