"""Many devices and many processes: one mesh, and where on it each array lies (jax.sharding).

The mesh has two axes. A batch is split over both. Parameters, optimiser and moving average are
split over "fsdp" and repeated over "data". Everything else is the compiler's work: the same
program runs on 1 device and on 1,000, and computes the same numbers up to rounding.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run, before anything else of JAX is used.

    On Slurm, Open MPI and Cloud TPU the environment says who takes part. Elsewhere give all three
    arguments, the same first two in each process. A process that is alone stays so.

    Args:
      coordinator: "host:port" of process 0, reachable by all.
      num_processes: P ≥ 1.
      process_id: this process's number in 0..P−1.

    Raises:
      ValueError: only some of the three are given, or a number is out of range.

    Example:
      >>> initialize()  # no cluster here: nothing happens
      >>> jax.process_count()
      1
    """
    given = (coordinator, num_processes, process_id)
    if coordinator is None or num_processes is None or process_id is None:
        if given != (None, None, None):
            raise ValueError(
                f"coordinator, num_processes and process_id go together, got {given}: give all "
                "three, or none where Slurm, Open MPI or Cloud TPU says them"
            )
        if in_cluster():
            jax.distributed.initialize()
    elif not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be in 0..{num_processes - 1}, got {process_id}")
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def in_cluster(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that several processes (or a TPU's) were started together.

    Args:
      environ: environment variables.

    Returns:
      True in a Slurm step or an Open MPI job of more than one process, and on a Cloud TPU.

    Example:
      >>> in_cluster({"OMPI_COMM_WORLD_SIZE": "8"}), in_cluster({"SLURM_NTASKS": "8"})
      (True, False)
    """
    slurm = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    mpi = int(environ.get("OMPI_COMM_WORLD_SIZE") or 1)
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    tpu = importlib.util.find_spec("libtpu") and devices
    in_step = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys()  # of srun
    return (slurm > 1 and in_step) or mpi > 1 or bool(tpu)


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp") of all devices of all processes.

    Args:
      fsdp: over how many devices each parameter is split; divides their number.
      devices: those to use, by default all.

    Returns:
      A `Mesh` of shape (devices / fsdp, fsdp).

    Raises:
      ValueError: fsdp does not divide the number of devices.

    Example:
      >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1}
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp must divide the number of devices, {len(devices)}, got {fsdp}")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((len(devices) // fsdp, fsdp), AXES, axis_types=kinds, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """The largest axis that "fsdp" divides is split over it, the last of equals; else no axis is.

    Args:
      mesh: from `make_mesh`.
      leaf: anything with a shape.

    Returns:
      A `NamedSharding`.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[:1])
      >>> param_sharding(mesh, np.zeros((3, 3, 64, 128))).is_fully_replicated
      True
    """
    fsdp = mesh.shape["fsdp"]
    fitting = [(n, axis) for axis, n in enumerate(leaf.shape) if fsdp > 1 and n % fsdp == 0]
    if not fitting:
        return replicated(mesh)
    axis = max(fitting)[1]
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """`param_sharding` of every leaf: for parameters, moving average and optimiser alike."""
    return jax.tree.map(lambda leaf: param_sharding(mesh, leaf), tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch, on its way to its devices.

    Args:
      mesh: from `make_mesh`.
      batch: arrays (B/P, ...), part p of P in process p.

    Returns:
      Global arrays (B, ...), split over all devices.
    """
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device, None where it is not known.

    Args:
      device_kind: `device.device_kind`.

    Example:
      >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
      (989000000000000.0, None)
    """
    named = (v for name, v in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_kind))
    return next(named, None)
