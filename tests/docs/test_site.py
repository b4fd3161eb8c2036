"""The site builds without a warning, and every link between documents leads to something, on the forge too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.docs import site
from tests.house.test_house import PAGES

ROOT = Path(__file__).parents[2]


def anchors(path: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a document."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_to_something(path: Path) -> None:
    for part in site.FENCE.split(path.read_text())[::2]:
        for target, anchor in re.findall(r"\]\(([^)\s#]*)(#[^)\s]+)?\)", part):
            if re.match(r"[a-z]+:", target):
                continue
            found = (path.parent / target) if target else path
            assert found.exists(), target
            if anchor and found.suffix == ".md":
                assert anchor[1:] in anchors(found), f"{target}{anchor}"


def test_anchors_are_those_of_a_forge(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What `fit` does, and [why](x.md)\n\n```\n# no heading\n```\n## kind: fit\n## kind: fit\n")
    assert anchors(page) == {"what-fit-does-and-why", "kind-fit", "kind-fit-1"}


def test_links_are_moved_with_their_pages() -> None:
    moved = site.with_links("[a](../../raydetect/README.md#words)\n```\n[b](x)\n```\n", "docs/how-to/gpus.md")
    assert moved == "[a](../raydetect/README.md#words)\n```\n[b](x)\n```\n"
    assert site.with_links("[a](../docs/tutorial.md)", "cluster/README.md") == "[a](../tutorial.md)"
    assert site.with_links("[a](../docs)", "cluster/README.md") == "[a](../README.md)"
    assert site.with_links("[n](notebooks/first_detector.ipynb)", "docs/x.md") == "[n](notebooks/first_detector.md)"
    with pytest.raises(site.DeadLinkError, match=r"docs/x.md: no/such.md is not in the repository"):
        site.with_links("[a](no/such.md)", "docs/x.md")


def test_the_site_builds_without_a_warning() -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", "jobs.docs.site"], cwd=ROOT, check=True)
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    built = ROOT / "build" / "site"
    assert "Benjamini" in (built / "explanation/false-discoveries/index.html").read_text()
    assert (built / "cluster/raycluster.yaml").is_file() and (built / "notebooks/first_detector.ipynb").is_file()
    scripts = re.compile(r'(?:src|href)="(https?:[^"]*\.(?:js|css|woff2?))"')
    assert not [found for page in built.rglob("*.html") for found in scripts.findall(page.read_text())]
