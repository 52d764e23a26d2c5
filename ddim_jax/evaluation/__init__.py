"""Measuring how close samples are to data: distances, precision and recall, and their names."""

from ddim_jax.evaluation import extractors
from ddim_jax.evaluation.bits import BitsPerDim, bits_per_dim
from ddim_jax.evaluation.extractors import Extractor, features, parse_extractor
from ddim_jax.evaluation.figures import Evaluation, Figure, evaluate
from ddim_jax.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_jackknife,
    load_moments,
    moments,
    resumable_moments,
    save_moments,
)
from ddim_jax.evaluation.inception_weights import fetch_inception
from ddim_jax.evaluation.kernel import KernelDistance, kernel_distance, squared_mmd
from ddim_jax.evaluation.precision_recall import PrecisionRecall, precision_recall
from ddim_jax.evaluation.reference import (
    Reference,
    load_reference,
    reference_statistics,
    shipped_reference,
)

__all__ = [
    "BitsPerDim",
    "Evaluation",
    "Extractor",
    "Figure",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "Reference",
    "bits_per_dim",
    "evaluate",
    "extractors",
    "features",
    "fetch_inception",
    "frechet_distance",
    "frechet_jackknife",
    "kernel_distance",
    "load_moments",
    "load_reference",
    "moments",
    "parse_extractor",
    "precision_recall",
    "reference_statistics",
    "resumable_moments",
    "save_moments",
    "shipped_reference",
    "squared_mmd",
]
