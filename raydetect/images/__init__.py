"""Encoded bytes to pixels: decoders, orientation, bit depth, masks."""
