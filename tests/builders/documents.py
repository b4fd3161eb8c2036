"""The code blocks of Markdown documents."""

import re

FENCED = re.compile(r"^```(\w*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str = "") -> list[str]:
    """The content of the code blocks in one language; "" is for those of no language, which are commands.

    Fences are read in pairs, so that the end of one block is never the start of another.
    """
    return [content for name, content in FENCED.findall(text) if name == language]
