"""Decodes images and masks: formats, orientation, bit depth and resizing."""
