"""Pieces of Markdown that the pages of the reference share."""

import re
from collections.abc import Sequence

SENTENCE_END = (".", "?", "!", ":")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; pipes and line breaks in cells are escaped."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]) + "\n"


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"\s*\n\s*", " ", text.strip()).replace("|", "\\|")


def code(text: str) -> str:
    """Text in backquotes."""
    return f"`{text}`"


def escaped(text: str) -> str:
    """Plain text in which Markdown sees no markup: `{name}` and `<name>` stay as they are."""
    return re.sub(r"(?<!`)(\{\w+\}|<[\w ]+>)(?!`)", r"`\1`", text).replace("*", "\\*")


def sentence(text: str) -> str:
    """Text with a full stop, and a capital letter unless it begins with the name of a value, as in `none: ...`."""
    text = text.strip()
    if not text:
        return text
    start = text[0] if re.match(r"\w+:", text) else text[0].upper()
    return start + text[1:] + ("" if text.endswith(SENTENCE_END) else ".")
