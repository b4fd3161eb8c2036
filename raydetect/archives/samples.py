"""Identifies the images of a container and assigns sidecars to them, by name only.

An image `a/000.left.png` has the sidecar `a/000.left.json`, else `a/000.json`: the name without its suffix is tried
first, then without further dotted parts, as in WebDataset samples. Sidecars may be anywhere in the container.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from raydetect.archives.base import composed, has_suffix, is_hidden, is_image_name

SIDECARS = (".mask.png", ".json", ".cls")
MAX_SIDECAR_BYTES = 1 << 20
CONTAINER_SUFFIXES = (
    ".tar", ".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".7z", ".rar", ".zip", ".parquet", ".pq", ".tfrecord",
    ".h5", ".hdf5", ".mdb", ".beton", ".arrow", ".feather", ".npz",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a container.

    Attributes:
        name: path with `/` between folders.
        place: position in the container, which determines the order and the span; for most formats the byte offset.
        size: size in bytes.
        raw: name as stored in the container.
        status: "ok", or the reason why it cannot be read.
        error: one sentence if not ok, without the name of the file.
        is_named: False if the name could not be read, so that the file may be anything.
    """

    name: str
    place: int
    size: int
    raw: str
    status: str = "ok"
    error: str = ""
    is_named: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its sidecars by suffix.

    Attributes:
        copy: 0; for a file that a later one of the same name replaces, its number among those, from 1.
    """

    entry: Entry
    sidecars: dict[str, Entry] = field(default_factory=dict)
    copy: int = 0


@dataclass(slots=True)
class Arrangement:
    """The files of a container by kind; `by_name` has the images and sidecars by NFC name, without replaced ones."""

    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[Entry, str]] = field(default_factory=list)
    by_name: dict[str, Entry] = field(default_factory=dict)


def arrange(entries: Sequence[Entry]) -> Arrangement:
    """Separates images, sidecars and other files. Of several files with the same name the last one is used.

    Args:
        entries: all files of a container, sorted by `place`.
    """
    arranged, last = Arrangement(), {tidy(entry.name): i for i, entry in enumerate(entries)}
    copies: dict[str, int] = {}
    images: list[Sample] = []
    sidecars: dict[str, Entry] = {}
    for i, entry in enumerate(entries):
        name = tidy(entry.name)
        is_last = last[name] == i
        reason = left_out_reason(name) if entry.is_named else ""
        if not reason and is_last:
            arranged.by_name[composed(name)] = entry
        if reason or (is_sidecar(name) and not is_last):
            arranged.left_out.append((entry, reason or "replaced"))
        elif entry.is_named and is_sidecar(name):
            same = _lower_suffix(composed(name))
            if same in sidecars:  # the names differ only in case or Unicode normalisation
                arranged.left_out.append((sidecars[same], "replaced"))
            sidecars[same] = entry
        else:
            copies[name] = copies.get(name, 0) + (not is_last)
            images.append(Sample(entry, copy=0 if is_last else copies[name]))
    used: set[int] = set()
    for image in images:
        arranged.samples.append(Sample(image.entry, dict(_sidecars_of(image.entry, sidecars, used)), image.copy))
    for entry in sidecars.values():
        arranged.left_out.append((entry, "sidecar" if entry.place in used else "sidecar_without_image"))
    return arranged


def left_out_reason(name: str) -> str:
    """Returns the reason why a file is neither an image nor a sidecar by its name; "" if it may be one."""
    if is_hidden(name):
        return "hidden"
    if is_sidecar(name) or is_image_name(name) or not has_suffix(name):
        return ""
    return "unknown_container" if name.lower().endswith(CONTAINER_SUFFIXES) else "other_suffix"


def is_sidecar(name: str) -> bool:
    """Whether a file name has the suffix of a sidecar."""
    return name.lower().endswith(SIDECARS)


def tidy(name: str) -> str:
    """Removes the leading `./` that some programs write."""
    while name.startswith("./"):
        name = name[2:]
    return name


def stems(name: str) -> Iterator[str]:
    """Yields the names, without suffix, that sidecars of an image may have; the most specific first."""
    folder, slash, base = name.rpartition("/")
    stem = base.rpartition(".")[0] if has_suffix(base) else base
    while stem:
        yield f"{folder}{slash}{stem}"
        stem = stem.rpartition(".")[0]


def _sidecars_of(image: Entry, sidecars: dict[str, Entry], used: set[int]) -> Iterator[tuple[str, Entry]]:
    if not sidecars:
        return
    for suffix in SIDECARS:
        for stem in stems(composed(tidy(image.name))):
            entry = sidecars.get(stem + suffix)
            if entry is not None:
                used.add(entry.place)
                yield suffix, entry
                break


def _lower_suffix(name: str) -> str:
    suffix = next(suffix for suffix in SIDECARS if name.lower().endswith(suffix))
    return name[: -len(suffix)] + suffix
