"""Data sets, and batches of them by number."""

from ddim_jax.data.dataset import Dataset, hold_out, of_classes
from ddim_jax.data.files import from_arrays
from ddim_jax.data.index import changes
from ddim_jax.data.inspecting import inspect
from ddim_jax.data.sets import available, load
from ddim_jax.data.streams import batch_indices, batches, check_main_guard
from ddim_jax.data.tfds import DATA_DIR_VARIABLE, prepare
