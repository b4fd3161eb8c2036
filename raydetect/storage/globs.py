"""Patterns of paths in linear time: fsspec's regular expressions take a power of a name's length, one for each `*`."""

import fnmatch
import re
from collections.abc import Callable

from raydetect.errors import SpecError

MOST_STARS = 2  # of one name, for fsspec; names with more are matched here
MOST_ANY_DEPTH = 2


def linear_glob(path: str) -> tuple[str, Callable[[str], bool]]:
    """A pattern for `glob` of a filesystem that finds what `path` names and maybe more, and which of that is meant.

    Raises:
        SpecError: too many `**`, one beside a name with several `*`, or one that is part of a name.
    """
    segments = path.split("/")
    if any("**" in name and name != "**" for name in segments):
        raise SpecError(f"{path}: `**` stands for whole folders. Write `**/` alone, or one `*`.")
    any_depth = segments.count("**")
    many = {place for place, name in enumerate(segments) if name != "**" and name.count("*") > MOST_STARS}
    if any_depth > MOST_ANY_DEPTH or (any_depth and many):
        raise SpecError(
            f"{path}: has more than {MOST_ANY_DEPTH} `**`, or one beside a name with more than {MOST_STARS} `*`. "
            "Write fewer of them."
        )
    if not many:
        return path, lambda found: True
    exact = {place: re.compile(fnmatch.translate(segments[place])) for place in many}

    def is_meant(found: str) -> bool:
        names = found.split("/")
        return len(names) == len(segments) and all(regex.match(names[place]) for place, regex in exact.items())

    return "/".join("*" if place in many else name for place, name in enumerate(segments)), is_meant
