"""Shared torch building blocks of detectors; no data input or output."""
