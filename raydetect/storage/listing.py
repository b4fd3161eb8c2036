"""Finds every file below a folder, in parallel on S3, and without passing over closed folders on a local disk."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.spec import AbstractFileSystem

LISTERS = 16
MAX_FOLDERS_AT_ONCE = 256
SYSTEM_FOLDERS = ("lost+found", "$RECYCLE.BIN", "System Volume Information")  # often readable only by the system


def find_files(fs: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Finds every file below a folder. S3 lists keys page by page, so subfolders are listed in parallel."""
    if "file" in fs.protocol:
        refuse_closed_folders(path)
    if "s3" not in fs.protocol:
        return dict(fs.find(path, detail=True))
    entries = fs.ls(path, detail=True)
    folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
    if not 1 < len(folders) <= MAX_FOLDERS_AT_ONCE:
        return dict(fs.find(path, detail=True))
    found = {entry["name"]: entry for entry in entries if entry["type"] != "directory"}
    with ThreadPoolExecutor(LISTERS) as pool:
        for entries_below in pool.map(lambda folder: fs.find(folder, detail=True), folders):
            found |= entries_below
    return found


def before_wildcards(path: str) -> tuple[str, str]:
    """Splits a path into the folder before the first wildcard and the pattern below it."""
    position = min(path.find(char) for char in "*?[" if char in path)
    folder = path[:position].rpartition("/")[0]
    return folder, path[len(folder) + 1 :]


def refuse_closed_folders(path: str, depth: float = float("inf")) -> None:
    """Raises for local folders without read permission; fsspec would silently skip them and their content."""
    for folder, subfolders, _ in os.walk(path, onerror=_refuse_folder):
        if folder.count("/") - path.count("/") >= depth:
            subfolders.clear()


def _refuse_folder(error: OSError) -> None:
    name = os.path.basename(str(error.filename or ""))
    if not isinstance(error, FileNotFoundError) and not name.startswith(".") and name not in SYSTEM_FOLDERS:
        raise error
