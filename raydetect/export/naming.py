"""File names of exported images: flat, readable and safe for any key."""

import hashlib
import re

from raydetect.archives.base import IMAGE_SUFFIXES, split_key

SLUG_LENGTH, DIGEST_LENGTH = 80, 10


def file_name(key: str, image_uri: str) -> str:
    """Returns a file name that is unique to the key, such as `bolt-test-scratch-0007-1a2b3c4d5e.png`.

    Args:
        key: key of a row.
        image_uri: image URI of the same row, needed to find the member's name in the key.
    """
    member = split_key(key, image_uri)[1] or key
    stem, dot, ending = member.rpartition(".")
    suffix = f".{ending.lower()}" if dot and f".{ending.lower()}" in IMAGE_SUFFIXES else ""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", stem if suffix else member).strip("-")[-SLUG_LENGTH:].strip("-")
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:DIGEST_LENGTH]
    return f"{slug}-{digest}{suffix}" if slug else f"{digest}{suffix}"
