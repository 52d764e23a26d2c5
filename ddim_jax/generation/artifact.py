"""A whole sampler as one file that runs where there is nothing but JAX: `jax.export`'s StableHLO.

Beside `out.stablehlo` stands `out.json`, which says what it is, and, where the weights are not
inside, `out.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import export

from ddim_jax.arrays import Array, ArrayLike
from ddim_jax.generation.condition import check_none
from ddim_jax.generation.drawing import conditioned
from ddim_jax.generation.program import (
    as_input,
    image_shape_of,
    in_dtype,
    inputs_of,
    named,
    program_of,
    rounded,
)
from ddim_jax.sampling import Method, find_method
from ddim_jax.sampling.plan import check_network
from ddim_jax.storage.files import write_whole
from ddim_jax.storage.weights_file import read_safetensors, write_safetensors
from ddim_jax.version import __version__
from ddim_jax.weights import Model

FORMAT, KIND, SUFFIX = 1, "ddim_jax sampler", ".stablehlo"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DTYPES = ("float32", "float16", "bfloat16")


class Artifact(NamedTuple):
    """A sampler read from a file."""

    call: Callable[..., Array]  # the inputs of facts["inputs"], in order → (b, H, W, C) float32
    facts: dict[str, Any]  # what `out.json` says


def export_sampler(
    model: Model,
    tau: ArrayLike | Sequence[int],
    path: str | os.PathLike[str],
    eta: float = 0.0,
    *,
    method: str | Method = "ddim",
    clip: bool = False,
    start: Literal["noise", "seed"] = "noise",
    guidance: bool = True,
    weights: Literal["inside", "beside"] = "inside",
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    image_shape: Sequence[int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a whole sampler, S network calls and all, for any batch size and several platforms.

    What it takes, in this order, each only where it is needed:

    - weights, a dict of arrays, as `out.safetensors` holds them (`weights="beside"`);
    - x_T (b, H, W, C) float32; or seed () and numbers (b,), both uint32, from which x_T and the
      noise are drawn as `ddim-jax sample --seed` draws them (`start="seed"`);
    - key (2,) uint32, `jax.random.key_data` of a key, for a method with noise that starts from x_T;
    - labels (b,) int32, for a model with classes, whose number means none;
    - scale () float32, of classifier-free guidance: 1 is conditional.

    It gives x_0 (b, H, W, C) float32.

    Args:
      model: of `load_model`, or your own with `image_shape`.
      tau: (S,) strictly increasing ints in 1..T.
      path: the file, `….stablehlo`; its folder must exist.
      eta: of the method "ddim".
      method: a name of `METHODS`, `module:function`, or a `Method`.
      clip: clip each x̂_0 to [−1, 1].
      start: from x_T, or from a seed and the images' numbers.
      guidance: of a model with classes, whether there is a scale; it costs a second network call.
      weights: in the file, or beside it.
      dtype: "float32"; "float16", which halves the weights alone; "bfloat16", the weights and the
        network's activations, inside only. States are float32, activations else as the model says.
      platforms: some of "cpu", "cuda", "rocm", "tpu"; none of them need be here.
      image_shape: (H, W, C), of a model without a config.
      overwrite: replace the files if they exist.

    Returns:
      What `out.json` says: inputs, output, sampling, schedule, weights, platforms, versions.

    Raises:
      FileExistsError: one of the files exists and `overwrite` is False.
      FileNotFoundError: there is no such folder.
      ModuleNotFoundError: flatbuffers, which `jax.export` writes with, is not installed.
      ValueError: the name, τ, a method, a platform, a dtype or another choice is unknown or does
        not fit the model.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp, tempfile
      >>> path = tempfile.mkdtemp() + "/x.stablehlo"
      >>> model = ddim.Model(lambda w, x, t: w * x, jnp.float32(0.5), ddim.linear_schedule(1000))
      >>> facts = export_sampler(model, [1, 500, 1000], path, image_shape=(8, 8, 1))
      >>> facts["platforms"], [value["name"] for value in facts["inputs"]]
      (['cpu', 'cuda', 'tpu'], ['x_T'])
      >>> load_sampler(path).call(jnp.ones((2, 8, 8, 1))).shape
      (2, 8, 8, 1)
    """
    files = _files(path, weights, overwrite)
    _check_choices(start, weights, dtype, platforms)
    _needs_flatbuffers()
    shape = image_shape_of(model, image_shape)
    check_none(model, guidance)
    chosen = find_method(method, eta) if isinstance(method, str) else method
    if not isinstance(method, str) and eta:
        raise ValueError(f"give eta or a method, not both: got eta = {eta}; ddim(eta) is a method")
    plan = chosen(model.schedule, tau)
    network = conditioned(in_dtype(model, dtype), clip)
    check_network(network.apply_fn, plan)
    arrays = {name: rounded(name, leaf, dtype) for name, leaf in named(model.params).items()}
    classes = model.config.num_classes if model.config is not None else None
    inputs = inputs_of(plan, shape, start, classes, guidance)
    program = program_of(network, plan, shape, [value["name"] for value in inputs])
    if weights == "inside":
        program = partial(program, {name: np.asarray(a) for name, a in arrays.items()})
    scope = export.SymbolicScope()
    specs: list[Any] = [
        jax.ShapeDtypeStruct(
            export.symbolic_shape(",".join(map(str, value["shape"])), scope=scope), value["dtype"]
        )
        for value in inputs
    ]
    if weights == "beside":
        specs = [{n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}, *specs]
    exported = export.export(jax.jit(program), platforms=list(platforms))(*specs)
    content = bytes(exported.serialize())
    facts = _facts(model, exported, inputs, shape, arrays, dtype) | {
        "file": {"name": files[0].name, "sha256": hashlib.sha256(content).hexdigest()},
        "sampling": {
            "method": method if isinstance(method, str) else getattr(method, "__qualname__", ""),
            **{"eta": float(eta), "tau": np.asarray(tau).tolist(), "clip": clip},
        },
    }
    facts["weights"]["file"] = files[2].name if weights == "beside" else None
    if weights == "beside":
        write_safetensors(files[2], arrays, {})
    write_whole(files[0], content)
    write_whole(files[1], json.dumps(facts, indent=1, allow_nan=False, default=str).encode())
    return facts


def load_sampler(path: str | os.PathLike[str]) -> Artifact:
    """Read what `export_sampler` wrote, and check it; weights that stand beside it are read too.

    Args:
      path: the file, `….stablehlo`.

    Returns:
      An `Artifact`.

    Raises:
      FileNotFoundError: there is no such file, or not what stands beside it.
      ModuleNotFoundError: flatbuffers is not installed.
      ValueError: it is damaged, something else, of a newer format, or not for this platform.
    """
    _needs_flatbuffers()
    path = pathlib.Path(path)
    description = path.with_suffix(".json")
    for file in (path, description):
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: a sampler is {path.name} and {description.name}")
    facts, content = _described(description), path.read_bytes()
    if hashlib.sha256(content).hexdigest() != facts["file"]["sha256"]:
        raise ValueError(f"{path} is not the file of {description.name}: its SHA-256 differs")
    here = jax.default_backend()
    if here not in facts["platforms"] and not (here == "gpu" and _has_gpu(facts["platforms"])):
        raise ValueError(
            f"{path} is for {', '.join(facts['platforms'])}, and this is {here}: export it with "
            f"--platforms {' '.join([*facts['platforms'], here])}"
        )
    program: Callable[..., Array] = jax.jit(export.deserialize(bytearray(content)).call)
    if (beside := facts["weights"]["file"]) is not None:
        arrays = read_safetensors(path.with_name(beside))[0]
        if _digest(arrays) != facts["weights"]["sha256"]:
            raise ValueError(f"{beside} does not hold the weights of {description.name}")
        program = partial(program, jax.device_put(arrays))
    wanted = facts["inputs"]

    def call(*inputs: Any) -> Array:
        if len(inputs) != len(wanted):
            names = ", ".join(value["name"] for value in wanted)
            raise TypeError(f"this sampler takes ({names}), got {len(inputs)} inputs")
        return program(*map(as_input, wanted, inputs))

    return Artifact(call, facts)


def _facts(
    model: Model,
    exported: export.Exported,
    inputs: list[dict[str, Any]],
    shape: tuple[int, ...],
    arrays: dict[str, np.ndarray],
    dtype: str,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": KIND,
        "inputs": inputs,
        "output": {"shape": ["b", *shape], "dtype": "float32", "range": [-1, 1]},
        "platforms": list(exported.platforms),
        "schedule": model.facts.get("schedule", repr(model.schedule)),
        "prediction": model.prediction.kind,
        "weights": {
            "dtype": dtype,
            "parameters": sum(array.size for array in arrays.values()),
            "sha256": _digest(arrays),
        },
        "versions": {
            **{"ddim_jax": __version__, "jax": jax.__version__},
            "calling_convention": exported.calling_convention_version,
        },
    }


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name}:{arrays[name].dtype}:{arrays[name].shape};".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def _files(path: Any, weights: str, overwrite: bool) -> tuple[pathlib.Path, ...]:
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"a sampler is written as a file {SUFFIX}, got {path}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}; make it first")
    files = path, path.with_suffix(".json"), path.with_suffix(".safetensors")
    for file in files if weights == "beside" else files[:2]:
        if file.is_dir() or (file.exists() and not overwrite):
            raise FileExistsError(f"{file} exists; choose another name, or pass overwrite=True")
    return files


def _check_choices(start: str, weights: str, dtype: str, platforms: Sequence[str]) -> None:
    for name, value, known in (
        ("start", start, ("noise", "seed")),
        ("weights", weights, ("inside", "beside")),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if weights == "beside" and dtype == "bfloat16":
        raise ValueError('bfloat16 weights go inside; beside, take "float32" or "float16"')
    if isinstance(platforms, str) or not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms must be some of {PLATFORMS}, got {platforms!r}")
    if len(set(platforms)) != len(platforms):
        raise ValueError(f"platforms must name each once, got {platforms!r}")


def _described(path: pathlib.Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
        kind, version = facts["kind"], facts["format"]
        _ = facts["file"]["sha256"], facts["weights"]["file"], facts["platforms"], facts["inputs"]
        newer = version > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no sampler of ddim_jax: {error!r}") from error
    if kind != KIND:
        raise ValueError(f"{path} describes {kind}, not {KIND}")
    if newer:
        raise ValueError(
            f"{path} has format {version}, this version reads up to {FORMAT}: update ddim_jax"
        )
    return facts


def _has_gpu(platforms: Sequence[str]) -> bool:
    return bool({"cuda", "rocm"} & set(platforms))


def _needs_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jax.export writes and reads with flatbuffers: pip install flatbuffers",
            name="flatbuffers",
        ) from error
