"""Mistakes that pydantic finds, in the words of job files."""

from collections.abc import Iterable, Mapping
from typing import Any

VALUE_ERROR = "value_error"
WORDS = {
    "dataclass_type": "should be a mapping of settings",
    "dict_type": "should be a mapping",
    "mapping_type": "should be a mapping",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "string_type": "should be text",
    "string_sub_type": "should be text",
    "string_unicode": "should be text in UTF-8",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_parsing_size": "should be a whole number of 64 bits",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "finite_number": "should be a finite number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "literal_error": "should be {expected}",
    "greater_than": "should be greater than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "string_pattern_mismatch": "should match the pattern {pattern}",
    "string_too_short": "should have at least {min_length} characters",
    "string_too_long": "should have at most {max_length} characters",
    "too_short": "should have at least {min_length} entries, but has {actual_length}",
    "too_long": "should have at most {max_length} entries, but has {actual_length}",
    "multiple_of": "should be a multiple of {multiple_of}",
    "invalid_key": "is a key that should be text",
    "none_required": "should be null",
}
OTHERS = "cannot be used"  # a kind of error that no setting of ours can raise so far


def reason_of(item: Mapping[str, Any]) -> str:
    """Why a value is refused, as the end of a sentence about it.

    Args:
        item: an error of pydantic.
    """
    context = {k: f"{v:.12g}" if isinstance(v, float) else v for k, v in item.get("ctx", {}).items()}
    if item["type"] == VALUE_ERROR:
        return str(context["error"])
    return WORDS.get(item["type"], OTHERS).format(**context)


def merged(reasons: Iterable[str]) -> str:
    """One reason for a value that fits none of several types: `should be text or a list`."""
    first, *others = dict.fromkeys(reasons)
    return " or ".join([first, *(reason.removeprefix("should be ") for reason in others)])
