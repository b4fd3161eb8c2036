"""Which files of a container are images, and which sidecars belong to which image; from names alone.

An image `a/000.left.png` takes `a/000.left.json`, else `a/000.json`: names without their suffix, then up to each dot
before it, as WebDataset's samples have it. Sidecars may stand anywhere in the container.
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
        name: its path, with `/` between folders.
        place: where it begins, for its order and the span that it belongs to.
        size: bytes.
        raw: its name as the container has it.
        status: "ok", or the reason why it cannot be read.
        error: one sentence when not ok, without the name of the file.
        is_named: False where the name could not be read, and the file may be anything.
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
        copy: 0, or for a file that a later one of its name replaces, which copy of the name it is.
    """

    entry: Entry
    sidecars: dict[str, Entry] = field(default_factory=dict)
    copy: int = 0


@dataclass(slots=True)
class Arrangement:
    """The files of a container by what they are; `by_name` holds the files that count, by composed name."""

    samples: list[Sample] = field(default_factory=list)
    left_out: list[tuple[Entry, str]] = field(default_factory=list)
    by_name: dict[str, Entry] = field(default_factory=dict)


def arrange(entries: Sequence[Entry]) -> Arrangement:
    """Tells images, sidecars and all else apart. Of several files of one name the last is the file.

    Args:
        entries: all files of a container, in order of their places.
    """
    found, last = Arrangement(), {tidy(entry.name): i for i, entry in enumerate(entries)}
    copies: dict[str, int] = {}
    images: list[Sample] = []
    sidecars: dict[str, Entry] = {}
    for i, entry in enumerate(entries):
        name = tidy(entry.name)
        is_last = last[name] == i
        reason = left_out_reason(name) if entry.is_named else ""
        if not reason and is_last:
            found.by_name[composed(name)] = entry
        if reason or (is_sidecar(name) and not is_last):
            found.left_out.append((entry, reason or "replaced"))
        elif entry.is_named and is_sidecar(name):
            same = _lower_suffix(composed(name))
            if same in sidecars:  # names that differ in case or composition alone
                found.left_out.append((sidecars[same], "replaced"))
            sidecars[same] = entry
        else:
            copies[name] = copies.get(name, 0) + (not is_last)
            images.append(Sample(entry, copy=0 if is_last else copies[name]))
    used: set[int] = set()
    for image in images:
        found.samples.append(Sample(image.entry, dict(_sidecars_of(image.entry, sidecars, used)), image.copy))
    for entry in sidecars.values():
        found.left_out.append((entry, "sidecar" if entry.place in used else "sidecar_without_image"))
    return found


def left_out_reason(name: str) -> str:
    """Why a file is neither an image nor a sidecar by its name; "" when it may be one."""
    if is_hidden(name):
        return "hidden"
    if is_sidecar(name) or is_image_name(name) or not has_suffix(name):
        return ""
    return "unknown_container" if name.lower().endswith(CONTAINER_SUFFIXES) else "other_suffix"


def is_sidecar(name: str) -> bool:
    """Whether a file's name is that of a sidecar."""
    return name.lower().endswith(SIDECARS)


def tidy(name: str) -> str:
    """A name without the `./` that some packers write before it."""
    while name.startswith("./"):
        name = name[2:]
    return name


def stems(name: str) -> Iterator[str]:
    """The names under which sidecars of an image are looked for, the most specific first."""
    folder, slash, base = name.rpartition("/")
    stem = base.rpartition(".")[0] if has_suffix(base) else base
    while stem:
        yield f"{folder}{slash}{stem}"
        stem = stem.rpartition(".")[0]


def _sidecars_of(image: Entry, sidecars: dict[str, Entry], used: set[int]) -> Iterator[tuple[str, Entry]]:
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
