"""Data sets, and batches of them by number."""

from ddim_jax.data.sets import (
    Dataset,
    available,
    batch_indices,
    batches,
    check_main_guard,
    load,
)
from ddim_jax.data.tfds import prepare
