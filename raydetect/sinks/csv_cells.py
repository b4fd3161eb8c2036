"""CSV cells that no spreadsheet interprets as a formula, whichever separator it uses.

Excel uses `;` in German and French, LibreOffice asks, and quotes do not protect if the reader uses another separator
than the writer. So an apostrophe is inserted before a formula sign not only at the start of a text, but also after
every character that may separate cells or lines, with blanks and quotes in between. Numbers are unchanged.

Removing one apostrophe at each match of `PUT` restores the text.
"""

import json
import re
from typing import Any

# A cell may begin at the start of the text or after a separator or line break, followed by blanks, quotes and
# zero-width characters. Full-width signs come from Asian keyboards; spreadsheets accept them as signs.
LINES = "\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
BLANKS = f'(?:[^\\S{LINES}]|["\0-\x08\x0e-\x1b\x1f\x7f\u200b-\u200f\u2060\ufeff])*+'
BEGIN = f"(?:^|[,;|{LINES}]){BLANKS}"
SIGNS = "[=+\\-@\uff1d\uff0b\uff0d\uff20\u2212]"
GUARDED = re.compile(f"({BEGIN})(?='*{SIGNS})")
PUT = re.compile(f"({BEGIN})'(?='*{SIGNS})")


def cell(value: Any) -> Any:
    """Converts a value to the content of a CSV cell; lists become JSON."""
    if isinstance(value, list):
        value = json.dumps(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return GUARDED.sub(r"\1'", value) if isinstance(value, str) else value
