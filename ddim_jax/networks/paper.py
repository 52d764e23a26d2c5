"""The networks of the paper, all with the linear schedule."""

from __future__ import annotations

from ddim_jax.networks.config import UNetConfig

# Weights files do not hold dropout; 0.1 was used in training, but for LSUN.
PAPER = {
    "cifar10": UNetConfig(dropout=0.0),
    "celeba64": UNetConfig(image_size=64, multipliers=(1, 2, 2, 2, 4), dropout=0.0),
    "lsun256": UNetConfig(image_size=256, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0),
}
