"""Artifacts that others replace: refused unless that is asked for, named, and removed as a whole afterwards."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from raydetect.artifacts.fleet import read_index
from raydetect.artifacts.record import RECORD
from raydetect.errors import ArtifactError, SpecError
from raydetect.storage import Storage, join_uri, normalise_uri

TENSORS = r"tensors-[0-9a-f]{16}\.safetensors"
WRITTEN = re.compile(rf"(?P<own>{TENSORS})|categories/(?:[a-z0-9_-]+-)?[0-9a-f]{{12}}/(?:artifact\.json|{TENSORS})")


@dataclass(frozen=True, slots=True)
class Existing:
    """An artifact that is there.

    Attributes:
        uri: its folder.
        text: detector, date and digest, as far as they can be read.
    """

    uri: str
    text: str


def existing_artifact(uri: str, storage: Storage) -> Existing | None:
    """Describes the artifact at a URI; None if there is none.

    Raises:
        StorageError: the storage failed.
    """
    uri = normalise_uri(uri)
    info = storage.info(join_uri(uri, RECORD))
    if info is None:
        return None
    try:
        index = read_index(uri, storage)
    except ArtifactError:
        what, digest = "an artifact that cannot be read", ""
    else:
        what = f"fleet of {len(index.categories):,} categories" if index.categories else str(index.body["detector"])
        digest = f" (sha256 {index.digest[:16]})"
    day = "" if info.modified is None else f" of {datetime.fromtimestamp(info.modified, UTC):%Y-%m-%d %H:%M} UTC"
    return Existing(uri, f"{what}{day}{digest}")


def refuse_existing(uri: str, storage: Storage, setting: str, how: str) -> None:
    """Refuses to write where an artifact is.

    Args:
        uri: where the new artifact goes.
        storage: storage of that URI.
        setting: that names the URI, for the message.
        how: what to do to replace it.

    Raises:
        SpecError: there is one.
        StorageError: the storage failed.
    """
    found = existing_artifact(uri, storage)
    if found is not None:
        raise SpecError(f"{setting}: {found.uri} holds {found.text} already. Use another place, or {how}.")


def remove_replaced(uri: str, storage: Storage) -> None:
    """Removes the tensors and members of earlier artifacts, which the record that is there now does not name.

    Raises:
        ArtifactError, StorageError: the record cannot be read, or a file cannot be removed.
    """
    index = read_index(uri, storage)
    folders = {ref.uri for ref in index.categories.values()}
    in_members = (RECORD,) if index.is_shared else (RECORD, ".safetensors")
    own = index.body.get("tensors", {}).get("file")
    for file in list(storage.list(uri)):
        name = file.uri.removeprefix(f"{uri.rstrip('/')}/")
        match = WRITTEN.fullmatch(name)
        if match is None:
            continue
        folder = file.uri.rpartition("/")[0]
        is_named = match["own"] == own if match["own"] else folder in folders and name.endswith(in_members)
        if not is_named:
            storage.delete(file.uri)
