"""Metrics, with numpy and scipy only."""
