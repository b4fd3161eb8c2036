"""Fitted detectors on disk: records, fleets and tensors."""
