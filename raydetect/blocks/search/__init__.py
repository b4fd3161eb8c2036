"""Nearest-neighbour search, exact unless it says otherwise."""

from raydetect.moved_modules import names_of

__getattr__ = names_of("raydetect.blocks.search", "raydetect.blocks.search.search")
