"""Stored detectors: records, fleets and tensors."""
