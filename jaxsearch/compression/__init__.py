"""Smaller models and shorter inputs from those that are there."""
