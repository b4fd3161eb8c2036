"""Nearest-neighbour search, exact unless it says otherwise."""
