"""Weights and images that are the same on every machine and with every version of NumPy."""

import math
import zlib

import numpy as np


def uniform(name, shape):
    """Numbers in [0, 1) by splitmix64 of their index, begun at the name's CRC."""
    with np.errstate(over="ignore"):
        z = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) + np.uint64(
            zlib.crc32(name.encode()) << 32
        )
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64).reshape(shape) / 2**53


def images(name, shape):
    return (uniform(name, shape) * 256).astype(np.uint8)


def state(shapes):
    """A state dict: He-scaled kernels; scales and variances in [½, 1½), shifts in [−0.2, 0.2)."""
    out = {}
    for name, shape in shapes.items():
        u = uniform(name, shape)
        if len(shape) > 1:
            u = (2 * u - 1) * np.sqrt(6 / math.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            u = 0.5 + u
        else:
            u = 0.4 * u - 0.2
        out[name] = u.astype(np.float32)
    return out
