"""Checks of the locations where a job reads and writes."""

from collections.abc import Callable

from raydetect.archives.open import open_archive
from raydetect.config import SourceSpec, StorageOptions
from raydetect.errors import SpecError
from raydetect.storage import Storage, normalise_uri

Check = Callable[[], object]  # raises a RaydetectError for a mistake


def first_shard(source: SourceSpec, options: StorageOptions) -> None:
    """Checks that the source has something to read.

    Raises:
        ArchiveError: the source is empty.
    """
    next(iter(open_archive(source, Storage(options)).shards()))


def reachable(uri: str, options: StorageOptions, setting: str) -> None:
    """Checks that the bucket of a URI exists; folders are created on write.

    Raises:
        SpecError: the bucket does not exist.
    """
    uri = normalise_uri(uri)
    storage = Storage(options)
    scheme, _, rest = uri.partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if scheme == "s3" and not storage.exists(bucket):
        raise SpecError(f"{setting}: the bucket {bucket} does not exist. Create it or correct the URI.")
