"""File names of exported images: flat, readable, and safe whatever a key holds."""

import hashlib
import re

from raydetect.archives.base import IMAGE_SUFFIXES, split_key

LETTERS, DIGITS = 80, 10


def file_name(key: str, image_uri: str) -> str:
    """`bolt-test-scratch-0007-1a2b3c4d5e.png`: different for different keys.

    Args:
        key: of a row.
        image_uri: of the same row, which tells where in the key the member's name begins.
    """
    member = split_key(key, image_uri)[1] or key
    stem, dot, ending = member.rpartition(".")
    suffix = f".{ending.lower()}" if dot and f".{ending.lower()}" in IMAGE_SUFFIXES else ""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", stem if suffix else member).strip("-")[-LETTERS:].strip("-")
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:DIGITS]
    return f"{slug}-{digest}{suffix}" if slug else f"{digest}{suffix}"
