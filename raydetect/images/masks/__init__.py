"""Masks of defects: decoding of mask files, and reading them by URI where the map or the input of an image is."""
