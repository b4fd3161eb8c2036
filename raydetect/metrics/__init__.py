"""Metrics: numpy and scipy only."""
