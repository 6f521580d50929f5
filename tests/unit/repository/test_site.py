"""The site: what it is made of, what a broken link does, and that its pages load nothing from elsewhere.

`make lint` builds the site of the repository; here `docs/conf.py` builds small ones.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from sphinx.util.matching import get_matching_files

from docs import conf
from tests.patience import START_SECONDS
from tests.unit.repository.test_repository import ROOT, committed

PAGES = {
    "README.md": "# Readme\n\n[a page](docs/page.md) [its section](docs/page.md#its-section)\n",
    "docs/index.md": (
        "# Index\n\n## Tutorial\n\n* [A page](page.md): words\n\n"
        "## Design\n\n* [Decisions](adr/README.md)\n* [Readme](../README.md)\n"
    ),
    "docs/adr/README.md": "# Decisions\n\n## All\n\n* [1. First](0001-first.md)\n",
    "docs/adr/0001-first.md": "# 1. First\n",
    "docs/page.md": (
        "# Page\n\n## Its section\n\n[the readme](../README.md) [code](../common/code.py) [a folder](../examples/own)"
        " [no page](../common) [its section](#its-section) [elsewhere](https://example.com)\n"
    ),
    "examples/own/README.md": "# Own\n",
    "common/code.py": "ANSWER = 42\n",
}
LISTED = PAGES["docs/index.md"] + "* [Own](../examples/own/README.md)\n"
# What a browser asks another host for, without a click: scripts, styles, pictures, frames, fonts.
ELSEWHERE = r"""["']?(?:https?:)?//[^\s"'>)]+"""
LOADS = re.compile(
    rf"<(?:script|img|iframe|source|embed)\b[^>]*\bsrc={ELSEWHERE}|<link\b[^>]*\bhref={ELSEWHERE}"
    rf"|(?:url\(|@import ){ELSEWHERE}"
)


def build(folder: Path, pages: Mapping[str, str]) -> tuple[int, str]:
    """Build a site of these pages in `folder`, as `make site` does; returns exit code and output."""
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(ROOT / "docs" / "conf.py", folder / "docs")
    command = next(line for line in make("site").splitlines() if "sphinx-build" in line).split("sphinx-build", 1)[1]
    ran = subprocess.run(
        [sys.executable, "-m", "sphinx", *command.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    return ran.returncode, ran.stdout + ran.stderr


def make(target: str) -> str:
    """What `make` would run."""
    ran = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS)
    return ran.stdout.replace("\\\n", "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert build(folder, {**PAGES, "docs/index.md": LISTED}) == (0, "")
    return folder / "site"


def test_links_lead_to_pages_sections_folders_and_copies_of_files(site: Path) -> None:
    page = (site / "docs" / "page.html").read_text()
    links = {text: target for target, text in re.findall(r'<a [^>]*href="([^"]+)"[^>]*><\w+[^>]*>([^<]+)<', page)}
    assert links["the readme"] == "../README.html"
    assert links["a folder"] == "../examples/own/README.html"
    assert (site / "docs" / links["code"]).read_text() == PAGES["common/code.py"]
    assert "no page" in page
    assert "no page" not in links
    assert 'href="docs/page.html#its-section"' in (site / "README.html").read_text()


def test_the_navigation_is_what_the_lists_name(site: Path) -> None:
    page = (site / "docs" / "adr" / "0001-first.html").read_text()
    captions = re.findall(r'class="caption-text">([^<]+)<', page)
    assert captions == ["Tutorial", "Design"]
    assert re.search(r'<a class="[^"]*" href="\.\./page\.html">A page</a>', page)
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 8
    assert {path.name: found for path in files if (found := LOADS.findall(path.read_text()))} == {}
    assert LOADS.findall('<script src="https://cdn.example.com/x.js"></script>')
    assert LOADS.findall("@font-face { src: url(//fonts.example.com/x.woff2) }")


def test_no_document_loads_anything_from_elsewhere() -> None:
    pattern = re.compile(rf"!\[[^\]]*\]\((?:https?:)?//|{LOADS.pattern}")
    names = [path for path in committed() if path.suffix in (".md", ".svg")]
    assert [path for path in names if pattern.search(path.read_text())] == []


def test_a_broken_link_an_unknown_section_and_a_page_in_no_list_are_errors(tmp_path: Path) -> None:
    broken = {
        "CHANGELOG.md": "# Changes\n\n[gone](docs/gone.md)\n",
        "docs/page.md": (
            "# Page\n\n## Its section\n\n[gone](../README.md#gone) [here](#nowhere) [file](../common/gone.py)\n"
        ),
        "docs/lonely.md": "# Lonely\n",
    }
    code, output = build(tmp_path, {**PAGES, "docs/index.md": LISTED + "* [Changes](../CHANGELOG.md)\n", **broken})
    assert code == 1
    faults = {
        "'docs/gone.md'": "CHANGELOG.md:3",
        "'gone'": "docs/page.md:5",
        "'nowhere'": "docs/page.md:5",
        "'../common/gone.py'": "docs/page.md:5",
        "document isn't included in any toctree": "docs/lonely.md",
    }
    for fault, place in faults.items():
        assert [line for line in output.splitlines() if place in line and fault in line], (fault, output)
    assert output.count("WARNING") == len(faults)


def test_every_document_is_a_page_and_the_linter_builds_them() -> None:
    pages = get_matching_files(str(ROOT), conf.include_patterns, conf.exclude_patterns)
    documents = [str(path.relative_to(ROOT)) for path in committed() if path.suffix == ".md"]
    assert sorted(set(documents) - set(pages)) == []
    assert "sphinx-build --quiet --fail-on-warning --fresh-env" in make("lint")
