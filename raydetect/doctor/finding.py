"""A finding: what was looked at, whether it will do, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        topic: what was looked at, such as "torch"; at most 12 characters.
        state: ok; note: jobs run, but something is worth knowing; missing: something needed does not work.
        found: what was found, without secrets.
        advice: what to do about it; "" if nothing.
    """

    topic: str
    state: State
    found: str
    advice: str = ""
