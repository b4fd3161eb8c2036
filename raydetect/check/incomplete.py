"""Finds the mistakes in a job whose settings cannot all be read, by the parts of it that can."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from raydetect.artifacts.fleet import read_index, read_records
from raydetect.artifacts.replacement import refuse_existing
from raydetect.check.locations import Check, first_shard
from raydetect.config import DetectorSpec, FlagSpec, SourceSpec, StorageOptions, ViewSpec
from raydetect.config.jobs import KINDS
from raydetect.config.validation import validate
from raydetect.errors import RaydetectError, SpecError, is_outage
from raydetect.planning.plan import check_flag
from raydetect.storage import Storage, normalise_uri

T = TypeVar("T")
REPLACE = "fit with --replace (replace: true)"


@dataclass(frozen=True, slots=True)
class _Parts:
    """The settings of a job of a kind that can be read on their own."""

    kind: str
    values: Mapping[str, Any]
    storage: StorageOptions | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", self.part("storage", StorageOptions, StorageOptions()))

    def part(self, name: str, spec: type[T], default: T | None = None) -> T | None:
        """One setting; None if it is missing or wrong, or jobs of this kind have none."""
        hints = get_type_hints(KINDS[self.kind])
        if name not in hints or name not in self.values:
            return default if name in hints else None
        value = {"nothing": True} if spec is FlagSpec and self.values[name] == "none" else self.values[name]
        try:
            return validate(spec, value, name) if isinstance(value, Mapping) else None
        except SpecError:
            return None

    def text(self, name: str) -> str | None:
        """One setting that is text."""
        value = self.values.get(name)
        return value if isinstance(value, str) else None


def further_problems(values: Mapping[str, Any]) -> list[str]:
    """Returns one sentence for each mistake beside those of the settings as such: detector, images, artifact, flag.

    Args:
        values: content of a job file, in which some settings are wrong.
    """
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        return []
    found = []
    for check in _checks(_Parts(kind, values)):
        try:
            check()
        except RaydetectError as error:
            found += [] if is_outage(error) else [str(error)]
    return list(dict.fromkeys(found))


def _checks(parts: _Parts) -> Iterator[Check]:
    detector = parts.part("detector", DetectorSpec)
    if detector is not None:
        seed = parts.values.get("seed", 0)
        yield lambda: _build(detector, seed if isinstance(seed, int) else 0)
    source, storage = parts.part("source", SourceSpec), parts.storage
    if storage is None:
        return
    if source is not None:
        yield lambda: first_shard(source, source.storage or storage)
    view = parts.part("view", ViewSpec)
    if detector is not None and view is not None:
        yield lambda: _view(view, detector, Storage(storage))
    artifact = parts.text("artifact")
    if (
        parts.kind == "fit"
        and artifact is not None
        and not parts.values.get("replace")
        and "extend" not in parts.values
    ):
        yield lambda: refuse_existing(artifact, Storage(storage), "artifact", REPLACE)
    if parts.kind in ("score", "audit", "calibrate") and artifact is not None:
        flag = parts.part("flag", FlagSpec, FlagSpec())
        yield lambda: _artifact(artifact, flag, Storage(storage))


def _build(detector: DetectorSpec, seed: int) -> None:
    from raydetect.detectors._registry import build_from

    build_from(detector, seed).load_weights()


def _view(view: ViewSpec, detector: DetectorSpec, storage: Storage) -> None:
    from raydetect.artifacts.fit_preprocess import view_of
    from raydetect.detectors._registry import build_from

    try:
        image_size = build_from(detector, 0).params.image_size
    except RaydetectError:
        return  # the check of the detector says why
    view_of(view.without_files_of_category, image_size, storage)


def _artifact(uri: str, flag: FlagSpec | None, storage: Storage) -> None:
    records = read_records(read_index(normalise_uri(uri), storage), storage)
    if flag is not None:
        check_flag(records, flag)
