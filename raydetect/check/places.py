"""Where a job reads and writes."""

from collections.abc import Callable

from raydetect.archives.open import open_archive
from raydetect.errors import SpecError
from raydetect.spec import SourceSpec, StorageOptions
from raydetect.storage import Storage, normalise_uri

Check = Callable[[], object]  # raises a RaydetectError for a mistake


def first_shard(source: SourceSpec, options: StorageOptions) -> None:
    """There is something to read.

    Raises:
        ArchiveError: there is not.
    """
    next(iter(open_archive(source, Storage(options)).shards()))


def reachable(uri: str, options: StorageOptions, word: str) -> None:
    """The bucket must be there; folders are made when something is written.

    Raises:
        SpecError: it is not.
    """
    uri = normalise_uri(uri)
    storage = Storage(options)
    scheme, _, rest = uri.partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if scheme == "s3" and not storage.exists(bucket):
        raise SpecError(f"{word}: the bucket {bucket} does not exist. Create it or mend the URI.")
