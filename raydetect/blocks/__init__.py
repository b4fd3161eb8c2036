"""Blocks: torch building parts that detectors share; no data input or output."""
