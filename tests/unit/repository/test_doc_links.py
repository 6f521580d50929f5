"""Documents: every link and every path in them exists, and the map of the trainer equals its layers of imports."""

import re
import tomllib
from functools import cache
from pathlib import Path

from tests.unit.repository.test_repository import ROOT, committed

FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = "services|common|tests|deploy|docs|benchmarks|examples|constraints"
PATH = re.compile(rf"`((?:{FOLDERS}|penstock(?:_\w+)?)/[\w./-]+)(?:::\w+)?`")
ROOTS = (".", "common", "services/agent", "services/rollout", "services/reward", "services/trainer", "deploy/launch")


def documents() -> dict[str, str]:
    """Name and text of every committed document, except the changelog, which may name past files."""
    paths = [path for path in committed() if path.suffix == ".md" and path.name != "CHANGELOG.md"]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings)


def leads_somewhere(document: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = document.parent / name if name else document
    return path.exists() and (not anchor or anchor in anchors(path))


def test_every_relative_link_leads_somewhere() -> None:
    links = [(name, target) for name, text in documents().items() for target in LINK.findall(FENCED.sub("", text))]
    inside = [(name, target) for name, target in links if not re.match(r"[a-z]+:", target)]
    assert len(inside) > 100
    assert [link for link in inside if not leads_somewhere(ROOT / link[0], link[1])] == []


def test_every_path_of_the_repository_exists() -> None:
    named = [(name, path) for name, text in documents().items() for path in PATH.findall(text)]
    assert len(named) > 20
    assert [each for each in named if not any((ROOT / root / each[1]).exists() for root in ROOTS)] == []


def test_the_map_of_the_trainer_is_the_contract_of_its_imports() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [each["layers"] for each in contracts if each.get("containers") == ["penstock_trainer"]]
    blocks = FENCED.findall((ROOT / "docs" / "architecture.md").read_text())
    [picture] = [block for block in blocks if "weight_sync" in block]
    places = [picture.find(layer) for layer in layers]
    assert -1 not in places
    assert places == sorted(places)


def test_the_glossary_has_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text().partition("## Words that we avoid")[0]
    cells = re.findall(r"^\| ([^|]+) \|(?: [^|]+ \|){3}$", text, re.MULTILINE)
    words = [word for word in cells if word not in ("Our word", "---")]
    assert len(words) > 40
    assert len(set(words)) == len(words)
