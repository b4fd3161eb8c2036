"""Fits on Ray Train."""
