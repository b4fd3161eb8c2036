"""Glob patterns in linear time: fsspec's regular expressions take polynomial time, one power for each `*`."""

import fnmatch
import re
from collections.abc import Callable

from raydetect.errors import SpecError

MAX_STARS = 2  # per path segment, for fsspec; segments with more are matched here
MAX_ANY_DEPTH = 2


def linear_glob(path: str) -> tuple[str, Callable[[str], bool]]:
    """Returns a pattern for fsspec's `glob` that finds at least what `path` matches, and a filter for its results.

    Raises:
        SpecError: there are too many `**`, one together with a segment of several `*`, or one inside a segment.
    """
    segments = path.split("/")
    if any("**" in name and name != "**" for name in segments):
        raise SpecError(f"{path}: `**` stands for whole folders. Write `**/` or a single `*`.")
    any_depth = segments.count("**")
    many = {index for index, name in enumerate(segments) if name != "**" and name.count("*") > MAX_STARS}
    if any_depth > MAX_ANY_DEPTH or (any_depth and many):
        raise SpecError(
            f"{path}: has more than {MAX_ANY_DEPTH} `**`, or one beside a name with more than {MAX_STARS} `*`. "
            "Use fewer of them."
        )
    if not many:
        return path, lambda found: True
    exact = {index: re.compile(fnmatch.translate(segments[index])) for index in many}

    def matches(found: str) -> bool:
        names = found.split("/")
        return len(names) == len(segments) and all(regex.match(names[index]) for index, regex in exact.items())

    return "/".join("*" if index in many else name for index, name in enumerate(segments)), matches
