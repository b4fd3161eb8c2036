"""Writes docs/reference/ from the code: commands, job files, detectors and the Python interface.

`python -m jobs.docs.reference` writes the pages; `make docs` does so before it builds the site.
"""

from pathlib import Path

from jobs.docs import commands, detectors, job_files, python_api

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
NOTICE = "<!-- Written by `make docs` from the code. Change the code, not this page. -->\n\n"
PAGES = {
    "commands.md": commands.page,
    "job-files.md": job_files.page,
    "detectors.md": detectors.page,
    "python.md": python_api.page,
}


def pages() -> dict[str, str]:
    """The text of every page by its file name; the same on every machine."""
    return {name: NOTICE + page() for name, page in PAGES.items()}


def write() -> None:
    """Writes every page to docs/reference/."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
