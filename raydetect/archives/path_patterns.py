"""Reads category, label and mask from member paths by patterns such as `{category}/test/{defect}/{name}.png`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from raydetect.archives.base import composed
from raydetect.archives.labels import LabelReading, folded, read_label
from raydetect.config import SourceSpec
from raydetect.errors import SpecError

FIELD = re.compile(r"\{([a-z_]+)\}")
FIELDS = ("category", "split", "defect", "label", "name")
MAX_PATTERN_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class PathFacts:
    """Facts from a member's path; `raw_label` is the text of the label, `note` the reason why it is not a label."""

    category: str | None = None
    defect: str | None = None
    label: int | None = None
    mask_name: str | None = None
    raw_label: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """The position in a name where a pattern matches, and the values of its fields."""

    start: int
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern of literals and fields for whole path segments at the end of a name.

    Every field matches at least one character and no `/`. Matching is greedy: the first field is as long as possible,
    then the second, and so on. The result equals that of a regular expression with `[^/]+` for each field, but in
    linear time; the time of the expression is polynomial, with the number of fields as degree.

    Attributes:
        segments: for each segment the literals before, between and after its fields, and the names of the fields.
    """

    segments: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    @classmethod
    def of(cls, template: str, where: str) -> "Pattern":
        """Parses a template such as `{category}/{name}.png`; `where` is for messages.

        Raises:
            SpecError: it is too long, or has an unknown field, a repeated field or an unpaired brace.
        """
        if len(template) > MAX_PATTERN_LENGTH:
            raise SpecError(
                f"{where}: has {len(template):,} characters; at most {MAX_PATTERN_LENGTH:,} are allowed. Shorten it."
            )
        names = FIELD.findall(template)
        for name in names:
            if name not in FIELDS:
                raise SpecError(f"{where}: {{{name}}} is not a field. Use {', '.join(FIELDS)}.")
            if names.count(name) > 1:
                raise SpecError(f"{where}: {{{name}}} is there twice. Keep one.")
        if "{" in FIELD.sub("", template) or "}" in FIELD.sub("", template):
            raise SpecError(f"{where}: {template!r} has an unpaired brace. Write fields as {{name}}.")
        parts = [FIELD.split(segment) for segment in template.split("/")]
        return cls(tuple((tuple(part[::2]), tuple(part[1::2])) for part in parts))

    def match(self, name: str) -> Match | None:
        """Matches the end of a name, which one line break may follow; returns None if it does not match."""
        match = self._match(name)
        return self._match(name[:-1]) if match is None and name.endswith("\n") else match

    def _match(self, name: str) -> Match | None:
        segments = name.rsplit("/", len(self.segments))[-len(self.segments) :]
        if len(segments) < len(self.segments):
            return None
        fields: dict[str, str] = {}
        for (literals, names), segment in zip(self.segments, segments, strict=True):
            values = _values(literals, segment)
            if values is None:
                return None
            fields.update(zip(names, values, strict=True))
        return Match(len(name) - len("/".join(segments)), fields)


def _values(literals: tuple[str, ...], segment: str) -> list[str] | None:
    """Returns the texts between the literals; each literal is as far right as possible."""
    first, *between = literals
    if not between:
        return [] if segment == first else None
    last = between.pop()
    if not segment.startswith(first) or not segment.endswith(last):
        return None
    stop, values = len(segment) - len(last), list[str]()
    for literal in reversed(between):
        start = segment.rfind(literal, len(first) + 1, stop - 1) if stop > len(first) + 1 else -1
        if start < 0:
            return None
        values.append(segment[start + len(literal) : stop])
        stop = start
    return [segment[len(first) : stop], *reversed(values)] if stop > len(first) else None


@dataclass(frozen=True, slots=True)
class Naming:
    """The patterns of one source.

    A pattern matches whole path segments at the end of a member's name, so `{category}/test/{defect}/{name}.png`
    also matches `data/bottle/test/good/000.png`. Every field matches within one segment. Names are compared in NFC.
    """

    pattern: Pattern | None
    mask_pattern: Pattern | None
    mask_template: str
    normal_names: frozenset[str]

    @classmethod
    def of(cls, source: SourceSpec) -> "Naming":
        """Returns the naming of a source.

        Raises:
            SpecError: a pattern is invalid, or the mask pattern has a field that the pattern lacks.
        """
        template = composed(source.mask_pattern or "")
        if template and source.pattern is None:
            raise SpecError("source.mask_pattern needs source.pattern, whose fields it uses. Add pattern.")
        pattern = None if source.pattern is None else Pattern.of(composed(source.pattern), "source.pattern")
        mask = Pattern.of(template, "source.mask_pattern") if template else None
        missing = sorted(set(FIELD.findall(template)) - set(FIELD.findall(source.pattern or "")))
        if missing:
            raise SpecError(f"source.mask_pattern: source.pattern has no field {{{missing[0]}}}. Add it there.")
        return cls(pattern, mask, template, frozenset(folded(name) for name in source.normal_names))

    def read(self, name: str) -> PathFacts | None:
        """Returns the facts of an image's path; None if it is a mask or does not match the pattern."""
        if self.pattern is None:
            return PathFacts()
        name = composed(name)
        if self.is_mask(name):
            return None
        match = self.pattern.match(name)
        if match is None:
            return None
        fields = match.fields
        defect = fields.get("defect")
        label_text = fields.get("label")
        reading = self._of_defect(defect) if label_text is None else read_label(label_text, self.normal_names)
        label = reading.label
        mask = None
        if self.mask_template and label == 1:
            mask = name[: match.start] + FIELD.sub(lambda field: fields[field.group(1)], self.mask_template)
        return PathFacts(fields.get("category"), defect, label, mask, reading.raw, reading.note)

    def is_mask(self, name: str) -> bool:
        """Whether a path matches the mask pattern."""
        return self.mask_pattern is not None and self.mask_pattern.match(composed(name)) is not None

    def _of_defect(self, defect: str | None) -> LabelReading:
        """Reads the label from the defect type: `unknown` is a defect type too; 0 and 1 are labels."""
        if defect is None:
            return LabelReading()
        if defect in ("0", "1"):
            return LabelReading(int(defect), defect)
        return LabelReading(int(folded(defect) not in self.normal_names), defect)
