"""How Sphinx makes the site of the repository's Markdown; `make site` runs it.

It reads the same files that a reader of the repository opens, and the same links work in both. docs/index.md and
docs/adr/README.md list the navigation: a page that neither lists is an error of the build, and so is a broken link.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

project = "Penstock"
html_title = "Penstock"
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "docs/**.md", "examples/**README.md", "benchmarks/**README.md"]
# All folders without pages, so that Sphinx does not walk through environments and runs.
SOURCES = Path(__file__).parents[1]
exclude_patterns = sorted(
    each.name for each in SOURCES.iterdir() if each.is_dir() and each.name not in ("docs", "examples", "benchmarks")
)
extensions = ["myst_parser"]
myst_heading_anchors = 6
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
CONTENTS = ("docs/index", "docs/adr/README")
SECTION = re.compile(r"^## (?P<title>.+)$(?P<text>(?:\n(?!## ).*)*)", re.MULTILINE)
ENTRY = re.compile(r"^\* \[(?P<title>[^\]]+)\]\((?P<path>[^)#]+)\.md\)", re.MULTILINE)


def navigation(text: str) -> str:
    """The tables of contents that the sections of a page list, as directives."""
    tables = []
    for section in SECTION.finditer(text):
        entries = [f"{entry['title']} <{entry['path']}>" for entry in ENTRY.finditer(section["text"])]
        if entries:
            tables.append("\n".join(["```{toctree}", ":hidden:", f":caption: {section['title']}", *entries, "```"]))
    return "\n\n".join(tables)


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Readers of the repository see the lists of these pages; the site shows them beside each page, too."""
    if page in CONTENTS:
        source[0] += "\n\n" + navigation(source[0]) + "\n"


def resolve_folders(app: Sphinx, page: nodes.document) -> None:
    """A link to a folder leads to its README; to one without, there is none on the site. Files are copied by MyST."""
    here = SOURCES / app.env.docname
    for link in list(page.findall(pending_xref)):
        folder = here.parent / link["reftarget"]
        if link.get("refdomain") is not None or not folder.is_dir():
            continue
        readme = (folder / "README.md").resolve()
        if readme.exists():
            link["refdomain"], link["reftarget"] = "doc", app.env.path2doc(readme)
            link["reftargetid"] = None
        else:
            link.replace_self(link.children)


def begin_at_the_index(app: Sphinx, error: Exception | None) -> None:
    """The site's address itself leads to the first page."""
    (app.outdir / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", resolve_folders)
    app.connect("build-finished", begin_at_the_index)
