"""Cells of CSV files which no spreadsheet takes for a formula, whatever separator it reads by.

Excel separates by `;` in German and French, LibreOffice asks, and quotes protect nothing where another separator is
taken than was written. So a formula's first letter gets an apostrophe in front not only at the beginning of a text, but
behind every letter inside that may separate cells or lines, blanks and quotes between not counting. Numbers stay.

Taking one apostrophe away wherever `PUT` finds one gives the text back.
"""

import re
from typing import Any

# Where a cell may begin: at the beginning, behind a separator or line break, and then behind blanks, quotes and letters
# of no width. Full-width signs are typed by Asian keyboards, and are signs to spreadsheets.
LINES = "\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
BLANKS = f'(?:[^\\S{LINES}]|["\0-\x08\x0e-\x1b\x1f\x7f\u200b-\u200f\u2060\ufeff])*+'
BEGIN = f"(?:^|[,;|{LINES}]){BLANKS}"
SIGNS = "[=+\\-@\uff1d\uff0b\uff0d\uff20\u2212]"
GUARDED = re.compile(f"({BEGIN})(?='*{SIGNS})")
PUT = re.compile(f"({BEGIN})'(?='*{SIGNS})")


def cell(value: Any) -> Any:
    """What stands in a CSV file for a value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return GUARDED.sub(r"\1'", value) if isinstance(value, str) else value
