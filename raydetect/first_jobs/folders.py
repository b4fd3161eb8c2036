"""What the folders of images mean: good and bad parts, train and test, categories, masks. Reads names only.

A level of folders is counted from the file: 1 is the folder that an image is in. The level nearest to the file with a
word for good or bad parts has the labels; above it may be a level with train and test, and one of categories.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raydetect.archives.labels import folded
from raydetect.errors import SpecError

NORMAL_WORDS = ("good", "normal", "ok")  # the default of source.normal_names
MORE_NORMAL = (
    "defect-free", "defect_free", "defectfree", "gut", "healthy", "intact", "io", "no_defect", "non_defective",
    "nondefective", "pass", "passed",
)  # fmt: skip
BAD_WORDS = (
    "abnormal", "anomalies", "anomalous", "anomaly", "bad", "broken", "defect", "defective", "defects", "fail",
    "failed", "faulty", "ko", "n_ok", "ng", "nio", "nok", "not_ok", "reject", "rejected", "rejects", "schlecht",
    "scrap",
)  # fmt: skip
TRAIN_WORDS, TEST_WORDS = ("train", "training"), ("test", "testing", "test_public", "validation", "valid", "val")
MASK_WORDS = frozenset(("ground_truth", "groundtruth", "gt", "mask", "masks"))
AROUND = re.compile(
    r"^(?:images?|imgs?)[ _-]+|[ _-]*(?:images?|imgs?|set)$|[ _-]+(?:data|files|parts|photos|pictures|samples)$"
)
WORDS = re.compile(r"[^A-Za-z]+")
NAMED = 4  # folders in a message


@dataclass(frozen=True, slots=True)
class Folders:
    """How to read the paths of a source.

    Attributes:
        train, test: pattern of the images to fit on and of those to score; None = all images.
        mask: pattern of masks of anomalous images in `test`.
        normal_names: names of the folders of good parts, if a pattern needs others than the default.
        normal_folder: the only folder of good parts to fit on, relative to the source; "" if there is none.
        is_top_normal: good parts lie beside the folders of bad ones.
        categories: their names, if images are sorted by them.
        loose_groups: names of folders of unknown meaning.
        num_normal: images to fit on.
        num_anomalous: images in folders of bad parts, to score.
        why: one sentence.
    """

    train: str | None = None
    test: str | None = None
    mask: str | None = None
    normal_names: tuple[str, ...] = ()
    normal_folder: str = ""
    is_top_normal: bool = False
    categories: tuple[str, ...] = ()
    loose_groups: tuple[str, ...] = ()
    num_normal: int = 0
    num_anomalous: int = 0
    why: str = "no folder has a name that says good or bad, so every image counts as a good part"


def read_folders(names: Sequence[str], where: str) -> Folders:
    """Reads the paths of images.

    Args:
        names: paths relative to the source, with `/` between folders.
        where: the source, for messages.

    Raises:
        SpecError: there are folders of bad parts and none of good ones.
    """
    images: list[tuple[str, ...]] = []
    masks: list[tuple[str, ...]] = []
    for name in names:
        (masks if is_mask(name) else images).append(tuple(name.split("/")))
    level = _labels(images)
    return _without_labels(images) if level is None else _Labelled(where, images, masks, level).read()


def meaning(folder: str) -> str:
    """The word that says what a folder has: `training` of `Training-Images`."""
    word = folded(folder)
    return AROUND.sub("", word, count=1) or word


def is_mask(name: str) -> bool:
    """Whether a path is in a folder of masks."""
    return any(meaning(folder) in MASK_WORDS for folder in name.split("/")[:-1])


def _is_normal(word: str) -> bool:
    return meaning(word) in (*NORMAL_WORDS, *MORE_NORMAL)


def _values(images: Sequence[tuple[str, ...]], level: int) -> Counter[str]:
    return Counter(path[-1 - level] for path in images if len(path) > level)


def _labels(images: Sequence[tuple[str, ...]]) -> int | None:
    for level in range(1, max((len(path) for path in images), default=1)):
        if any(_is_normal(word) or meaning(word) in BAD_WORDS for word in _values(images, level)):
            return level
    return None


def _split(images: Sequence[tuple[str, ...]], above: int) -> int | None:
    for level in range(above + 1, max((len(path) for path in images), default=1)):
        if any(meaning(word) in TRAIN_WORDS + TEST_WORDS for word in _values(images, level)):
            return level
    return None


def _word(values: Counter[str], known: Sequence[str]) -> str | None:
    return next((word for one in known for word in sorted(values) if meaning(word) == one), None)


def _without_labels(images: Sequence[tuple[str, ...]]) -> Folders:
    level = _split(images, 0)
    if level is not None:
        values = _values(images, level)
        train, test = _word(values, TRAIN_WORDS), _word(values, TEST_WORDS)
        between = [len(_values(images, one)) == 1 for one in range(1, level)]
        if level == 1 and train is not None and all(between):
            return Folders(
                train=f"{train}/{{name}}",
                test=f"{test or train}/{{name}}",
                normal_folder=train,
                num_normal=values[train],
                why=f"a folder is named {train}, and none says good or bad: what is in it counts as good parts"
                + _named_bad([path for path in images if path[-2:-1] == (train,)]),
            )
    groups = tuple(sorted(_values(images, 1)))
    why = Folders().why + _named_bad(images)
    return Folders(num_normal=len(images), loose_groups=groups if len(groups) > 1 else (), why=why)


def _named_bad(fitted: Sequence[tuple[str, ...]]) -> str:
    """A warning if the names of files say that some are bad parts; "" if none does."""
    bad = [path[-1] for path in fitted if any(folded(word) in BAD_WORDS for word in WORDS.split(path[-1]))]
    if not bad:
        return ""
    verb = "has a name that says" if len(bad) == 1 else "have names that say"
    return f". BUT {len(bad):,} of {len(fitted):,} {verb} bad, such as {bad[0]}: move those to another folder first"


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Paths of which one level tells good from bad."""

    where: str
    images: list[tuple[str, ...]]
    masks: list[tuple[str, ...]]
    level: int

    def read(self) -> Folders:
        """Reads them.

        Raises:
            SpecError: no folder has good parts.
        """
        words = _values(self.images, self.level)
        normal = tuple(sorted(word for word in words if _is_normal(word))) or self._unnamed_normal(words)
        if not normal:
            return self._top_normal(words)
        if self.level > 1:
            return self._deep(normal)
        return self._patterns(normal)

    def _unnamed_normal(self, words: Counter[str]) -> tuple[str, ...]:
        """The only folder whose name does not say bad, if it is the only one."""
        others = sorted(word for word in words if meaning(word) not in BAD_WORDS)
        if len(others) > 1:
            shown = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
            raise SpecError(
                f"{self.where}: has folders of bad parts, and none of {shown} is named good, ok or normal. Give the "
                "folder of good parts alone, and the whole one as --new."
            )
        return tuple(others)

    def _top_normal(self, words: Counter[str]) -> Folders:
        above = [path for path in self.images if len(path) == 1]
        bad = ", ".join(sorted(words)[:NAMED])
        if not above or self.level > 1:
            raise SpecError(
                f"{self.where}: has only folders of bad parts ({bad}). A fit needs good ones: give their folder."
            )
        return Folders(
            is_top_normal=True,
            num_normal=len(above),
            num_anomalous=sum(words.values()),
            why=f"images beside the folder {bad} count as good parts",
        )

    def _deep(self, normal: tuple[str, ...]) -> Folders:
        """Good parts in further folders below the one that says so, which a pattern cannot name."""
        found = sorted(
            {"/".join(path[: -self.level]) for path in self.images if path[-1 - self.level :][:1] == normal[:1]}
        )
        if len(normal) > 1 or len(found) != 1:
            shown = ", ".join(found[:NAMED])
            raise SpecError(
                f"{self.where}: good parts are in several folders with folders below them ({shown}). Give one of them."
            )
        count = sum("/".join(path[: -self.level]) == found[0] for path in self.images)
        return Folders(
            normal_folder=found[0],
            num_normal=count,
            num_anomalous=len(self.images) - count,
            why=f"the folder {found[0]} has the good parts, in further folders",
        )

    def _patterns(self, normal: tuple[str, ...]) -> Folders:
        split = _split(self.images, self.level)
        category = self._category(split)
        top = max(self.level, split or 0, category or 0)
        suffix = self._suffix()
        values = Counter[str]() if split is None else _values(self.images, split)
        train, test = _word(values, TRAIN_WORDS), _word(values, TEST_WORDS)

        def pattern(word: str | None) -> str:
            segments = ["{name}" + suffix, "{defect}"]
            for level in range(self.level + 1, top + 1):
                only = next(iter(_values(self.images, level)))
                segments.append("{category}" if level == category else (word or only) if level == split else only)
            return "/".join(reversed(segments))

        fit_word, score_word = train or test, test or train
        fitted = self._in(split, fit_word, normal)
        scored = [path for path in self.images if split is None or path[-1 - split :][:1] == (score_word,)]
        folders = sorted({"/".join(path[:-1]) for path in fitted})
        anomalous = [path for path in scored if len(path) > top and not self._is_good(path, normal)]
        known = {folded(word) for word in normal} <= set(NORMAL_WORDS)
        categories = sorted({path[-1 - category] for path in fitted}) if category else []
        return Folders(
            train=pattern(fit_word),
            test=pattern(score_word),
            mask=self._mask(anomalous, top, suffix, category),
            normal_names=() if known else normal,
            normal_folder=folders[0] if len(folders) == 1 else "",
            categories=tuple(categories),
            num_normal=len(fitted),
            num_anomalous=len(anomalous),
            why=_why(normal, fit_word, categories),
        )

    def _is_good(self, path: tuple[str, ...], normal: tuple[str, ...]) -> bool:
        return path[-1 - self.level] in normal

    def _in(self, split: int | None, word: str | None, normal: tuple[str, ...]) -> list[tuple[str, ...]]:
        inside = [path for path in self.images if len(path) > max(self.level, split or 0)]
        return [path for path in inside if self._is_good(path, normal) and (split is None or path[-1 - split] == word)]

    def _category(self, split: int | None) -> int | None:
        """The level above the labels, and not of train and test, with several names."""
        deepest = max(len(path) for path in self.images)
        levels = [level for level in range(self.level + 1, deepest) if level != split]
        several = [level for level in levels if len(_values(self.images, level)) > 1]
        return several[0] if several else None

    def _suffix(self) -> str:
        """The suffix of all images; "" if they have several."""
        found = {posixpath.splitext(path[-1])[1] for path in self.images if len(path) > self.level}
        return found.pop() if len(found) == 1 else ""

    def _mask(self, anomalous: list[tuple[str, ...]], top: int, suffix: str, category: int | None) -> str | None:
        """The pattern by which most anomalous images have a mask."""
        if not suffix or not self.masks:
            return None
        by_stem: dict[str, list[tuple[str, ...]]] = {}
        for mask in self.masks:
            by_stem.setdefault(posixpath.splitext(mask[-1])[0], []).append(mask)
        found: Counter[str] = Counter()
        for path in anomalous:
            stem, start = path[-1].removesuffix(suffix), len(path) - 1 - top
            fields = {path[-1 - self.level]: "{defect}"}
            if category is not None:
                fields[path[-1 - category]] = "{category}"
            for end in ("_mask", ""):
                for mask in by_stem.get(stem + end, ()):
                    if mask[:start] == path[:start]:
                        folders = [fields.get(folder, folder) for folder in mask[start:-1]]
                        found["/".join([*folders, "{name}" + end + posixpath.splitext(mask[-1])[1]])] += 1
        good = {pattern: count for pattern, count in found.items() if "{defect}" in pattern or len(found) == 1}
        return max(good, key=lambda pattern: (good[pattern], pattern)) if good else None


def _why(normal: tuple[str, ...], word: str | None, categories: Sequence[str]) -> str:
    where = f" of {word}" if word else ""
    each = f", for each of {len(categories)} categories" if len(categories) > 1 else ""
    return f"the folder {' or '.join(normal)}{where} has the good parts{each}"
