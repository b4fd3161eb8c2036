"""Category, label and mask of a member from its path, by patterns such as `{category}/test/{defect}/{name}.png`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from raydetect.archives.base import composed
from raydetect.archives.labels import LabelReading, folded, read_label
from raydetect.config import SourceSpec
from raydetect.errors import SpecError

FIELD = re.compile(r"\{([a-z_]+)\}")
FIELDS = ("category", "split", "defect", "label", "name")
MAX_LETTERS = 1000


@dataclass(frozen=True, slots=True)
class PathFacts:
    """What a member's path says; `raw_label` is the word that the label was read from, `note` why it gave none."""

    category: str | None = None
    defect: str | None = None
    label: int | None = None
    mask_name: str | None = None
    raw_label: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """Where a pattern begins in a name, and what its fields are there."""

    start: int
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Literal texts and fields of whole path segments at the end of a name.

    Every field takes at least one letter and no `/`; where several readings fit, the first field is as long as can be,
    then the second, and so on. So does a regular expression of `[^/]+`, but its time grows with a power of the name's
    length, one for each field; a name is looked through once here.

    Attributes:
        segments: of each the literal texts before, between and behind its fields, and the fields' names.
    """

    segments: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    @classmethod
    def of(cls, template: str, where: str) -> "Pattern":
        """From a text such as `{category}/{name}.png`.

        Raises:
            SpecError: it is too long, or has an unknown field, a field twice, or a brace without the other.
        """
        if len(template) > MAX_LETTERS:
            raise SpecError(f"{where}: has {len(template):,} letters, at most {MAX_LETTERS:,} are read. Shorten it.")
        names = FIELD.findall(template)
        for name in names:
            if name not in FIELDS:
                raise SpecError(f"{where}: {{{name}}} is not a field. Use {', '.join(FIELDS)}.")
            if names.count(name) > 1:
                raise SpecError(f"{where}: {{{name}}} stands there twice. Keep one.")
        if "{" in FIELD.sub("", template) or "}" in FIELD.sub("", template):
            raise SpecError(f"{where}: {template!r} has an unpaired brace. Write fields as {{name}}.")
        parts = [FIELD.split(segment) for segment in template.split("/")]
        return cls(tuple((tuple(part[::2]), tuple(part[1::2])) for part in parts))

    def match(self, name: str) -> Match | None:
        """The fields of a name; None when it does not end as the pattern says. One line break may stand behind that."""
        found = self._match(name)
        return self._match(name[:-1]) if found is None and name.endswith("\n") else found

    def _match(self, name: str) -> Match | None:
        found = name.rsplit("/", len(self.segments))[-len(self.segments) :]
        if len(found) < len(self.segments):
            return None
        fields: dict[str, str] = {}
        for (literals, names), segment in zip(self.segments, found, strict=True):
            values = _values(literals, segment)
            if values is None:
                return None
            fields.update(zip(names, values, strict=True))
        return Match(len(name) - len("/".join(found)), fields)


def _values(literals: tuple[str, ...], segment: str) -> list[str] | None:
    """What stands between literal texts; from the right, so that each text stands as far right as it may."""
    first, *between = literals
    if not between:
        return [] if segment == first else None
    last = between.pop()
    if not segment.startswith(first) or not segment.endswith(last):
        return None
    stop, values = len(segment) - len(last), list[str]()
    for literal in reversed(between):
        place = segment.rfind(literal, len(first) + 1, stop - 1) if stop > len(first) + 1 else -1
        if place < 0:
            return None
        values.append(segment[place + len(literal) : stop])
        stop = place
    return [segment[len(first) : stop], *reversed(values)] if stop > len(first) else None


@dataclass(frozen=True, slots=True)
class Naming:
    """The patterns of one source.

    A pattern matches whole path segments at the end of a member's name, so `{category}/test/{defect}/{name}.png`
    also matches `data/bottle/test/good/000.png`. Every field matches inside one segment. Names are compared composed
    (Unicode's NFC).
    """

    pattern: Pattern | None
    mask_pattern: Pattern | None
    mask_template: str
    normal_names: frozenset[str]

    @classmethod
    def of(cls, source: SourceSpec) -> "Naming":
        """The naming of a source.

        Raises:
            SpecError: an unknown field, a field twice, or a mask pattern with fields the pattern lacks.
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
        """Facts of an image's path; None when it is a mask or not one of this source's images."""
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
        word = fields.get("label")
        reading = self._of_defect(defect) if word is None else read_label(word, self.normal_names)
        label = reading.label
        mask = None
        if self.mask_template and label == 1:
            filled = FIELD.sub(lambda found: fields[found.group(1)], self.mask_template)
            mask = name[: match.start] + filled
        return PathFacts(fields.get("category"), defect, label, mask, reading.raw, reading.note)

    def is_mask(self, name: str) -> bool:
        """Whether a path is that of a mask."""
        return self.mask_pattern is not None and self.mask_pattern.match(composed(name)) is not None

    def _of_defect(self, word: str | None) -> LabelReading:
        """A kind of defect is a word of its own, also where it is called `unknown`; 0 and 1 are labels."""
        if word is None:
            return LabelReading()
        if word in ("0", "1"):
            return LabelReading(int(word), word)
        return LabelReading(int(folded(word) not in self.normal_names), word)
