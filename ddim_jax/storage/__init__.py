"""Whole files, digests, checkpoints and weights on disk."""
