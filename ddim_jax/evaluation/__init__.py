"""Measuring how close samples are to data."""

from ddim_jax.evaluation.frechet import Moments, frechet_distance, moments

__all__ = ["Moments", "frechet_distance", "moments"]
