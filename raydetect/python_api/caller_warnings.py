"""Warnings that point to the line of the caller, not to one of this package."""

import sys
import warnings


def warn(message: str) -> None:
    """Warns, with a UserWarning, at the nearest line outside of raydetect; Python shows it once for each such line."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "raydetect":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
