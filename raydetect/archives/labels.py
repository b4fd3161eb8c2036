"""What a value of a label means: read by stated rules, never coerced.

| value | label |
|---|---|
| null, NaN, -1, or a word such as `unknown` | none: the image is unlabelled |
| 0, false | 0 (normal) |
| 1 and larger whole numbers, true | 1 (anomalous) |
| text | 0 if it is one of `source.normal_names`, in any case, else 1; digits and true/false as above |
| a number that stands for a class name (Hugging Face's ClassLabel) | by the name, as text |
| anything else: other negative numbers, fractions, lists | none, and the row has a note |

Class names none of which is normal say nothing: their rows have no label and a note.
"""

import math
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from raydetect.archives.base import readable

UNLABELLED = frozenset({"", "unknown", "unlabelled", "unlabeled", "none", "null", "nan", "na", "n/a", "?"})
WORDS = {"true": 1, "false": 0}
SHOWN = 40


@dataclass(frozen=True, slots=True)
class LabelReading:
    """A label and what it was read from.

    Attributes:
        label: 0 normal, 1 anomalous, None unknown.
        raw: the value as people wrote it, "" where there was none.
        note: why a value gave no label, else "".
    """

    label: int | None = None
    raw: str = ""
    note: str = ""


def folded(text: str) -> str:
    """Text for comparing: composed (NFC), in one case, without blanks around it."""
    return unicodedata.normalize("NFC", text).strip().casefold()


def read_label(value: Any, normal_names: Collection[str], class_names: Sequence[str] = ()) -> LabelReading:
    """The label of a value from a column, a sidecar or a path; see the top of this module.

    Args:
        value: of any type.
        normal_names: folded words that mean label 0.
        class_names: what numbers stand for, where the data says so.
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
        return LabelReading(None, "", f"label_not_read: {value} is none of {len(class_names)} classes")
    name = class_names[value]
    labels = {_of_text(name, normal_names).label for name in class_names}
    if 0 not in labels:
        return LabelReading(None, "", f"label_not_read: {_shown(name)} (no class is one of source.normal_names)")
    found = _of_text(name, normal_names)
    return LabelReading(found.label, f"{value} = {name}", found.note)


def _of_text(text: str, normal_names: Collection[str]) -> LabelReading:
    word = folded(text)
    raw = _shown(text.strip())
    if word in normal_names:
        return LabelReading(0, raw)
    if word in UNLABELLED:
        return LabelReading()
    if word in WORDS:
        return LabelReading(WORDS[word], raw)
    number = _number(word)
    if number is not None:
        return read_label(number, normal_names)
    return LabelReading(1, raw)


def _number(word: str) -> float | int | None:
    if len(word) > SHOWN or not any(letter.isdigit() for letter in word):
        return None
    try:
        return float(word) if set(word) <= set("0123456789.-+e") else None
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = readable(value)
    else:
        is_plain = isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)
        text = str(value) if is_plain else f"of type {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def labels_text(counts: Sequence[tuple[int | None, str, int]]) -> str:
    """`0 = good (209), 1 = broken (63)`: which values were read as which label, and how often.

    Args:
        counts: (label, value, images), in any order.
    """
    parts = []
    for label, raw, count in sorted(counts, key=lambda entry: (entry[0] is None, entry[0] or 0, entry[1])):
        value = f"{label} = {_name(raw)}" if label is not None else "none"
        parts.append(f"{value} ({count:,})")
    return ", ".join(parts)


def _name(raw: str) -> str:
    """Of `0 = good`, which a class label says, the name."""
    number, is_class, name = raw.partition(" = ")
    return name if is_class and number.isdigit() else raw
