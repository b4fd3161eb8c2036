"""Category, label and mask of a member from its path, by patterns such as `{category}/test/{defect}/{name}.png`."""

import re
from dataclasses import dataclass

from raydetect.archives.base import composed
from raydetect.archives.labels import LabelReading, folded, read_label
from raydetect.errors import SpecError
from raydetect.spec import SourceSpec

FIELD = re.compile(r"\{([a-z_]+)\}")
FIELDS = ("category", "split", "defect", "label", "name")


@dataclass(frozen=True, slots=True)
class PathFacts:
    """What a member's path says; `label_said` is the word that the label was read from, `note` why it gave none."""

    category: str | None = None
    defect: str | None = None
    label: int | None = None
    mask_name: str | None = None
    label_said: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Naming:
    """Compiled patterns of one source.

    A pattern matches whole path segments at the end of a member's name, so `{category}/test/{defect}/{name}.png`
    also matches `data/bottle/test/good/000.png`. Every field matches inside one segment. Names are compared composed
    (Unicode's NFC).
    """

    pattern: re.Pattern[str] | None
    mask_pattern: re.Pattern[str] | None
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
        pattern = None if source.pattern is None else _compile(composed(source.pattern), "source.pattern")
        mask = _compile(template, "source.mask_pattern") if template else None
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
        match = self.pattern.search(name)
        if match is None:
            return None
        fields = match.groupdict()
        defect = fields.get("defect")
        word = fields.get("label")
        reading = self._of_defect(defect) if word is None else read_label(word, self.normal_names)
        label = reading.label
        mask = None
        if self.mask_template and label == 1:
            filled = FIELD.sub(lambda found: fields[found.group(1)], self.mask_template)
            mask = name[: match.start("whole")] + filled
        return PathFacts(fields.get("category"), defect, label, mask, reading.said, reading.note)

    def is_mask(self, name: str) -> bool:
        """Whether a path is that of a mask."""
        return self.mask_pattern is not None and self.mask_pattern.search(composed(name)) is not None

    def _of_defect(self, word: str | None) -> LabelReading:
        """A kind of defect is a word of its own, also where it is called `unknown`; 0 and 1 are labels."""
        if word is None:
            return LabelReading()
        if word in ("0", "1"):
            return LabelReading(int(word), word)
        return LabelReading(int(folded(word) not in self.normal_names), word)


def _compile(template: str, where: str) -> re.Pattern[str]:
    names = FIELD.findall(template)
    for name in names:
        if name not in FIELDS:
            raise SpecError(f"{where}: {{{name}}} is not a field. Use {', '.join(FIELDS)}.")
        if names.count(name) > 1:
            raise SpecError(f"{where}: {{{name}}} stands there twice. Keep one.")
    if "{" in FIELD.sub("", template) or "}" in FIELD.sub("", template):
        raise SpecError(f"{where}: {template!r} has an unpaired brace. Write fields as {{name}}.")
    parts = FIELD.split(template)
    text = "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>[^/]+)" for i, part in enumerate(parts))
    return re.compile(rf"(?:^|/)(?P<whole>{text})$")
