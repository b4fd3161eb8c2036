"""Gathers the pages of the site in build/docs/, from where `mkdocs build`, or another such builder, makes the site.

Documents link to each other by their paths in the repository, so that they can be read there too. The site has those
outside of docs/ under their own paths, a page for every notebook, and every other file that a page links to.
"""

import json
import posixpath
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
DOCS, HOME = "docs", "README.md"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```[^\S\n]*$)", re.MULTILINE | re.DOTALL)


class DeadLinkError(Exception):
    """A link that leads to nothing in the repository."""


def gather() -> None:
    """Writes the reference and build/docs/.

    Raises:
        DeadLinkError: a page links to a file that does not exist.
    """
    from jobs.docs import reference  # needs the extra docs, and links can be checked without it

    reference.write()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(ROOT / DOCS, SITE)
    for path in sorted([*(ROOT / DOCS).rglob("*.md"), *(ROOT / DOCS).rglob("*.ipynb"), *outside_pages()]):
        source = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = notebook_page(json.loads(text), path.name)
        target = SITE / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(with_links(text, source), encoding="utf-8")


def outside_pages() -> list[Path]:
    """Markdown files outside of docs/ that the site shows."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md")
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / path for path in found if path != HOME and not path.startswith(f"{DOCS}/")]


def place(source: str) -> str:
    """The path in the site of a file of the repository, whose own README is the site's first page."""
    return source.removeprefix(f"{DOCS}/").replace(".ipynb", ".md")


def notebook_page(notebook: dict, name: str) -> str:
    """A notebook's cells as Markdown, and below its title a link to the notebook."""
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in notebook["cells"]]
    shown = [text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in cells]
    title, _, rest = shown[0].partition("\n")
    return "\n\n".join([title, f"[Download this notebook](./{name})", rest.strip(), *shown[1:]])


def with_links(text: str, source: str) -> str:
    """A page whose relative links lead to where their targets are in the site; copies files that are not there yet.

    Args:
        text: Markdown.
        source: the page's path in the repository.
    """
    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(lambda m: _moved(m, source), part) for part in parts)


def _moved(match: re.Match[str], source: str) -> str:
    target, anchor = match.group(1), match.group(2) or ""
    if re.match(r"[a-z]+:", target) or target.startswith("./"):  # ./ is the notebook itself
        return match.group(0)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if (ROOT / path).is_dir():
        path = posixpath.join(path, HOME)
    if not (ROOT / path).is_file():
        raise DeadLinkError(f"{source}: {target} is not in the repository")
    copy = SITE / place(path)
    if copy.suffix != ".md" and not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy)
    return posixpath.relpath(place(path), posixpath.dirname(place(source)) or ".") + anchor


if __name__ == "__main__":
    gather()
