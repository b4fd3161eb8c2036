"""Algorithms: one file, one class each; none imports another."""
