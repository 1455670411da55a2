"""Links of README and docs lead somewhere, and every page can be reached. A second's work: `make check` runs it too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"")
LARGEST_PICTURE = 150_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_pictures_are_small(page):
    for target in (a or b for a, b in LINK.findall(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        path = page.parent / target.partition("#")[0]
        assert path.exists(), f"{page.name} links to {target}"
        assert path.suffix not in (".png", ".svg") or path.stat().st_size <= LARGEST_PICTURE, target


def test_every_page_is_linked_from_the_readme_or_the_start_page_and_is_on_the_site():
    readme, start = README.read_text(encoding="utf-8"), (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {*re.findall(r"\(docs/([\w/.-]+)[)#]", readme), *re.findall(r"\(([\w-]+\.md)[)#]", start)}
    site = {*re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert "index.md" in linked and pages - linked == set() == pages - site


def test_the_readme_is_a_first_screen():
    assert len(README.read_text(encoding="utf-8").split()) < 900
