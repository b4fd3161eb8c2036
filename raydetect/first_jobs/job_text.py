"""A job file in the making: settings in order, each with the reason for it, as values and as YAML with comments."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 100  # columns of a comment


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a job file.

    Attributes:
        name: the key.
        value: its value; None = the default holds, and only the reason is written.
        why: the reason, a sentence without a full stop.
        other: YAML of an alternative, written as a comment; "" = none.
    """

    name: str
    value: Any
    why: str
    other: str = ""


@dataclass(frozen=True, slots=True)
class JobText:
    """A job of a kind with its settings; `title` is the first comment."""

    kind: str
    title: str
    settings: Sequence[Setting]

    def values(self) -> dict[str, Any]:
        """The content of the job file."""
        return {"kind": self.kind} | {one.name: one.value for one in self.settings if one.value is not None}

    def text(self) -> str:
        """The job file, with a comment above each setting."""
        blocks = [f"{_comment(self.title)}kind: {self.kind}\n"]
        for one in self.settings:
            block = _comment(f"{one.name}: {one.why}.")
            if one.value is not None:
                block += yaml_text({one.name: one.value})
            if one.other:
                block += "".join(f"# {line}\n" for line in one.other.splitlines())
            blocks.append(block)
        return "\n".join(blocks)

    def lines(self) -> list[str]:
        """The reasons, one setting each, for 80 columns."""
        found = []
        for one in self.settings:
            found += textwrap.wrap(one.why, 78, initial_indent=f"  {one.name:<12} ", subsequent_indent=" " * 15)
        return found


def yaml_text(values: dict[str, Any]) -> str:
    """YAML in the order of the keys, with the innermost mappings and lists on one line."""
    parts = [
        yaml.safe_dump(
            {name: value},
            sort_keys=False,
            default_flow_style=None if isinstance(value, dict | list) else False,
            allow_unicode=True,
            width=120,
        )
        for name, value in values.items()
    ]
    return "".join(parts)


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False))
