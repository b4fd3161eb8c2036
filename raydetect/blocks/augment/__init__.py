"""Simulated defects and augmentations."""
