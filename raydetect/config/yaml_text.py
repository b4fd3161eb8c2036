"""Reads hand-written YAML files into plain values, with limits and few rules, and without quoting their content.

PyYAML parses the text. This module replaces its loaders, which guess types and have no limits:

- Keys are literal text: `no`, `2024` and `2026-11-28` are names. Each key occurs once.
- Values are `null`, `true`, `false`, decimal numbers, or literal text, which includes `no`, `on`, `010`, `12:30` and
  `2026-11-28`, other types in YAML 1.1.
- Anchors, aliases and merge keys (`<<`) work; tags (`!...`) and several documents in one file do not.
- A file has at most MAX_BYTES, MAX_DEPTH levels, and MAX_VALUES values after expanding aliases.

Messages give line numbers and never the content, which may be a secret.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raydetect.errors import SpecError

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 100_000, 32
PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CONTROL = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
INVALID_TEXT = re.compile(
    "[\0\ud800-\udfff]"
)  # characters that escapes such as "\0" can produce, and file names cannot contain
CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")
FLOAT = re.compile(
    r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
TAG_HANDLE = re.compile("'![^']*'")  # the only file content in PyYAML's messages, besides single characters
MERGE, LONGEST_KEY = "<<", 30


class NotYamlError(SpecError):
    """The text is not YAML."""


def read_text(path: Path, file_kind: str) -> str:
    """Reads a text file: UTF-8 or, with a byte order mark, UTF-16.

    Args:
        path: path of the file.
        file_kind: kind of file, for messages.

    Raises:
        SpecError: it cannot be read, is not a regular file, is larger than MAX_BYTES, or is not text.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would block until it has a writer
        with os.fdopen(handle, "rb") as file:
            file_status = os.fstat(handle)
            if not stat.S_ISREG(file_status.st_mode):
                raise SpecError(f"{path}: is not a regular file. Check the path of the {file_kind}.")
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"{path}: cannot be read ({reason}). Check the path of the {file_kind}.") from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path}: has more than {MAX_BYTES:,} bytes, too large for a {file_kind}. Check the path.")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: byte {error.start:,} is not valid UTF-8. Save the {file_kind} as UTF-8.") from None


def read_yaml(text: str) -> Any:
    """Parses a text into plain values: None, bool, int, float, str, list, dict with str keys.

    Raises:
        NotYamlError: the text is not YAML.
        SpecError: it breaks one of the rules at the top of this module.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"has more than {MAX_BYTES:,} characters, which is the limit. Check the path.")
    control = CONTROL.search(text)
    if control is not None:
        line = text.count("\n", 0, control.start()) + 1
        raise NotYamlError(f"line {line}: contains the character U+{ord(control.group()):04X}. Remove it.")
    try:
        return _Builder(text).document()
    except yaml.MarkedYAMLError as error:
        reason = TAG_HANDLE.sub("`!`", " ".join(str(error.problem).split()))
        position = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise NotYamlError(f"not valid YAML ({position}{reason}). Fix the file.") from None
    except yaml.YAMLError as error:
        raise NotYamlError(f"not valid YAML ({type(error).__name__}). Fix the file.") from None


@dataclass(frozen=True, slots=True)
class _Read:
    """A value with its number of values and depth after expanding aliases."""

    value: Any
    size: int = 1
    height: int = 1


class _Builder:
    """Builds plain values from the parser's events."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=PARSER)
        self._anchors: dict[str, _Read] = {}

    def document(self) -> Any:
        """The only document of the text; None if there is none."""
        next(self._events)  # start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        root = self._read(next(self._events), 1)
        next(self._events)  # end of the document
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise SpecError(f"line {_line(event)}: a second document starts. Write one file per document.")
        return root.value

    def _read(self, event: Any, depth: int) -> _Read:
        node = self._alias(event) if isinstance(event, yaml.AliasEvent) else None
        if depth + (node.height if node else 1) - 1 > MAX_DEPTH:
            raise SpecError(f"line {_line(event)}: has more than {MAX_DEPTH} levels. Flatten it.")
        node = node or self._fresh(event, depth)
        if node.size > MAX_VALUES:
            raise SpecError(
                f"line {_line(event)}: has more than {MAX_VALUES:,} values after expanding aliases. Use fewer."
            )
        return node

    def _alias(self, event: Any) -> _Read:
        anchored = self._anchors.get(event.anchor)
        if anchored is None:
            raise SpecError(
                f"line {_line(event)}: an alias (*...) has no anchor (&...) that ends before it. Quote text that "
                "starts with `*`."
            )
        return anchored

    def _fresh(self, event: Any, depth: int) -> _Read:
        if event.tag is not None:
            raise SpecError(
                f"line {_line(event)}: a tag (!...) is not supported. Remove it, or quote text that starts with `!`."
            )
        if isinstance(event, yaml.ScalarEvent):
            node = _Read(_scalar(event))
        else:
            node = self._sequence(depth) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _sequence(self, depth: int) -> _Read:
        items = [self._read(event, depth + 1) for event in self._until_end()]
        return _Read([item.value for item in items], *_extent(items))

    def _mapping(self, depth: int) -> _Read:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        items, seen = list[_Read](), set[str]()
        for event in self._until_end():
            key = self._key(event, seen)
            items.append(self._read(next(self._events), depth + 1))
            if key == MERGE and event.implicit[0]:
                merged = _merged(items[-1].value, event)
            else:
                own[key] = items[-1].value
        return _Read(merged | own, *_extent(items))

    def _key(self, event: Any, seen: set[str]) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise SpecError(f"line {_line(event)}: a key is not a plain name. Write a name before the `:`.")
        key = str(event.value)
        if key in seen:
            raise SpecError(f"line {_line(event)}: the key {shown_key(key)!r} occurs twice. Keep one of them.")
        seen.add(key)
        if event.anchor is not None:
            self._anchors[event.anchor] = _Read(key)
        return key

    def _until_end(self) -> Iterator[Any]:
        """Events of list items or mapping keys; the caller consumes the nested events."""
        for event in self._events:
            if isinstance(event, yaml.CollectionEndEvent):
                return
            yield event


def _extent(items: list[_Read]) -> tuple[int, int]:
    return 1 + sum(item.size for item in items), 1 + max((item.height for item in items), default=0)


def _merged(value: Any, event: Any) -> dict[str, Any]:
    """The mapping that `<<` merges in; the first of several mappings that has a key wins."""
    merged: dict[str, Any] = {}
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict):
            raise SpecError(f"line {_line(event)}: `<<` merges mappings only, such as `<<: *base`.")
        merged = part | merged
    return merged


def _scalar(event: Any) -> Any:
    text = str(event.value)
    if INVALID_TEXT.search(text):
        raise SpecError(f"line {_line(event)}: a text contains U+0000 or half of a surrogate pair. Remove it.")
    if not event.implicit[0]:  # quoted
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=[in])", "", text.lower()))  # Python's `inf` and `nan` have no dot
    return text


def shown_key(key: str) -> str:
    """A key that is safe to show in messages.

    Hides what follows a colon, since a missing space makes the value part of the key, and keys longer than any
    setting, which may be values.
    """
    name, colon, _ = key.partition(":")
    shown = name if len(name) <= LONGEST_KEY else f"({len(name):,} characters)"
    return f"{shown}{colon}..." if colon else shown


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
