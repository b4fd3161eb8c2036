"""Whether a place can be reached, with the time that reading, writing and deleting take there."""

import secrets
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from raydetect.config import StorageOptions
from raydetect.doctor.finding import Finding
from raydetect.errors import RaydetectError, StorageError
from raydetect.redaction import redacted
from raydetect.storage import Storage, join_uri, normalise_uri

PROBE_BYTES = 1 << 16
READ_BYTES = 1 << 20
CREDENTIALS = "Check the name, --endpoint-url, --profile and the keys in the AWS environment."


def place_findings(uris: Sequence[str], options: StorageOptions) -> Iterator[Finding]:
    """One finding for each URI: a small object is written, read back and deleted; a file is only read."""
    storage = Storage(options)
    for given in uris:
        try:
            yield _place(normalise_uri(given), storage)
        except RaydetectError as error:
            yield Finding("place", "missing", redacted(str(error)), CREDENTIALS)


def _place(uri: str, storage: Storage) -> Finding:
    info = storage.info(uri)
    shown = redacted(uri)
    if info is not None:
        seconds = _timed_read(uri, min(READ_BYTES, info.size_bytes), storage)
        return Finding("place", "ok", f"{shown}: a file; {min(READ_BYTES, info.size_bytes):,} bytes read in {seconds}")
    folder, is_new = _existing(uri, storage)
    probe, data = join_uri(folder, f".raydetect-doctor-{secrets.token_hex(8)}"), secrets.token_bytes(PROBE_BYTES)
    started = time.perf_counter()
    try:
        storage.write(probe, data)
    except StorageError as error:
        return _read_only(uri, storage, error)
    wrote = time.perf_counter()
    try:
        same, read = storage.read(probe) == data, time.perf_counter()
    finally:
        storage.delete(probe)
    deleted = time.perf_counter()
    if not same:
        return Finding("place", "missing", f"{shown}: gave back other bytes than were written", "Do not use it.")
    steps = (("written", wrote - started), ("read", read - wrote), ("deleted", deleted - read))
    times = ", ".join(f"{step} in {_milliseconds(seconds)}" for step, seconds in steps)
    later = "; does not exist yet and can be created" if is_new else ""
    return Finding("place", "ok", f"{shown}: {PROBE_BYTES >> 10} KiB {times}{later}")


def _existing(uri: str, storage: Storage) -> tuple[str, bool]:
    """The folder to write into, and whether the one that was asked for is still to be created.

    On a disk it is the nearest that exists, so that nothing is left behind.
    """
    folder = uri
    while folder.startswith("file:///") and not storage.exists(folder):
        folder = folder.rpartition("/")[0] or "file:///"
    return folder, folder != uri


def _read_only(uri: str, storage: Storage, error: StorageError) -> Finding:
    """The finding for a place that refuses writes.

    Raises:
        StorageError: it cannot be listed either.
    """
    started = time.perf_counter()
    count = len(list(islice(storage.list(uri), 1)))
    listed = _milliseconds(time.perf_counter() - started)
    found = f"{redacted(uri)}: {'listed' if count else 'empty, listed'} in {listed}, but cannot be written"
    return Finding("place", "note", f"{found} ({redacted(str(error))})", "Good for a source, not for results.")


def _timed_read(uri: str, size: int, storage: Storage) -> str:
    started = time.perf_counter()
    storage.read_range(uri, 0, size)
    return _milliseconds(time.perf_counter() - started)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
