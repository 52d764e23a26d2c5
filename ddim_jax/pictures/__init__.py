"""Pixels in and out, grids and plots."""
