"""Shapes and sizes in the settings of a view: polygons of a region, and how the papers resize and crop."""
