"""Interprets label values by fixed rules, without coercion.

| value | label |
|---|---|
| null, NaN, -1, or a word such as `unknown` | none: the image is unlabelled |
| 0, false | 0 (normal) |
| 1 and larger whole numbers, true | 1 (anomalous) |
| text | 0 if it is one of `source.normal_names`, ignoring case, else 1; digits and true/false as above |
| the number of a class (Hugging Face's ClassLabel) | that of the class name, as text |
| anything else: other negative numbers, fractions, lists | none, with a note in the row |

If no class name is one of `source.normal_names`, the rows have no label, and a note.
"""

import math
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from raydetect.archives.base import escaped_text

UNLABELLED = frozenset({"", "unknown", "unlabelled", "unlabeled", "none", "null", "nan", "na", "n/a", "?"})
BOOLEANS = {"true": 1, "false": 0}
SHOWN = 40


@dataclass(frozen=True, slots=True)
class LabelReading:
    """The result of reading a label.

    Attributes:
        label: 0 normal, 1 anomalous, None unknown.
        raw: the value as written; "" if there is none.
        note: reason why the value is not a label, else "".
    """

    label: int | None = None
    raw: str = ""
    note: str = ""


def folded(text: str) -> str:
    """Normalises text for comparison: NFC, case-folded, without surrounding whitespace."""
    return unicodedata.normalize("NFC", text).strip().casefold()


def read_label(value: Any, normal_names: Collection[str], class_names: Sequence[str] = ()) -> LabelReading:
    """Reads the label from a value of a column, sidecar or path by the rules at the top of this module.

    Args:
        value: a value of any type.
        normal_names: `folded` words for label 0.
        class_names: names of classes 0, 1, ..., if the data defines them.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return LabelReading()
    if isinstance(value, bool):
        return LabelReading(int(value), str(value).lower())
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value.bit_length() < 64:
        return _of_number(value, normal_names, class_names)
    if isinstance(value, str):
        return _of_text(value, normal_names)
    return LabelReading(None, "", f"label_not_read: {_shown(value)}")


def _of_number(value: int, normal_names: Collection[str], class_names: Sequence[str]) -> LabelReading:
    if value == -1:
        return LabelReading()
    if class_names:
        return _of_class(value, normal_names, class_names)
    if value < 0:
        return LabelReading(None, "", f"label_not_read: {_shown(value)}")
    return LabelReading(min(value, 1), _shown(value))


def _of_class(value: int, normal_names: Collection[str], class_names: Sequence[str]) -> LabelReading:
    if not 0 <= value < len(class_names):
        return LabelReading(None, "", f"label_not_read: {value} is not one of {len(class_names)} classes")
    name = class_names[value]
    labels = {_of_text(name, normal_names).label for name in class_names}
    if 0 not in labels:
        return LabelReading(None, "", f"label_not_read: {_shown(name)} (no class is one of source.normal_names)")
    reading = _of_text(name, normal_names)
    return LabelReading(reading.label, f"{value} = {name}", reading.note)


def _of_text(text: str, normal_names: Collection[str]) -> LabelReading:
    folded_text = folded(text)
    raw = _shown(text.strip())
    if folded_text in normal_names:
        return LabelReading(0, raw)
    if folded_text in UNLABELLED:
        return LabelReading()
    if folded_text in BOOLEANS:
        return LabelReading(BOOLEANS[folded_text], raw)
    number = _number(folded_text)
    if number is not None:
        return read_label(number, normal_names)
    return LabelReading(1, raw)


def _number(text: str) -> float | int | None:
    if len(text) > SHOWN or not any(letter.isdigit() for letter in text):
        return None
    try:
        return float(text) if set(text) <= set("0123456789.-+e") else None
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = escaped_text(value)
    else:
        is_plain = isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)
        text = str(value) if is_plain else f"of type {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def labels_text(counts: Sequence[tuple[int | None, str, int]]) -> str:
    """Formats how values were read: `0 = good (209), 1 = broken (63)`.

    Args:
        counts: (label, value, number of images), in any order.
    """
    parts = []
    for label, raw, count in sorted(counts, key=lambda entry: (entry[0] is None, entry[0] or 0, entry[1])):
        value = f"{label} = {_name(raw)}" if label is not None else "none"
        parts.append(f"{value} ({count:,})")
    return ", ".join(parts)


def _name(raw: str) -> str:
    """Returns the name in the value of a class label, such as `0 = good`; other values unchanged."""
    number, is_class, name = raw.partition(" = ")
    return name if is_class and number.isdigit() else raw
