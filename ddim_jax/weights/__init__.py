"""Trained models, whatever wrote them."""

from ddim_jax.weights.classifier import NoisyClassifier, load_classifier
from ddim_jax.weights.model import Model, from_facts, to_facts
from ddim_jax.weights.pretrained import load_model
from ddim_jax.weights.saving import save_diffusers, save_model
from ddim_jax.weights.torch_files import load_torch
