"""Trained models, whatever wrote them."""

from ddim_jax.weights.pretrained import (
    Model,
    from_facts,
    load_model,
    save_diffusers,
    save_model,
    to_facts,
)
from ddim_jax.weights.torch_files import load_torch
