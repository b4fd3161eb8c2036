"""Access to files by URL: local disk, S3 and other fsspec file systems, with actionable errors."""

from raydetect.storage.error_translation import disk_reason, translate
from raydetect.storage.files import RANGE_BYTES, FileInfo, Storage
from raydetect.storage.local_files import remove_leftovers, whole_file, whole_text
from raydetect.storage.scratch import Scratch
from raydetect.storage.stored_file import StoredFile
from raydetect.storage.uris import SCHEMES, check_uri, join_uri, normalise_uri, relative_to

__all__ = [
    "RANGE_BYTES",
    "SCHEMES",
    "FileInfo",
    "Scratch",
    "Storage",
    "StoredFile",
    "check_uri",
    "disk_reason",
    "join_uri",
    "normalise_uri",
    "relative_to",
    "remove_leftovers",
    "translate",
    "whole_file",
    "whole_text",
]
