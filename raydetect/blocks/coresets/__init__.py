"""Keyed rows over all workers: coresets, Gaussians, integer embeddings."""
