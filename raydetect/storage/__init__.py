"""Files on any storage behind one URL: local, S3 and what else fsspec opens, with errors people can act on."""

from raydetect.storage.error_translation import translate
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
    "join_uri",
    "normalise_uri",
    "relative_to",
    "remove_leftovers",
    "translate",
    "whole_file",
    "whole_text",
]
