"""Documents: every path in them exists, and the map of the trainer equals its layers of imports. (Links: test_site.)"""

import re
import tomllib

from tests.unit.repository.test_repository import ROOT, committed

FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
FOLDERS = "services|common|tests|deploy|docs|benchmarks|examples|constraints"
PATH = re.compile(rf"`((?:{FOLDERS}|penstock(?:_\w+)?)/[\w./-]+)(?:::\w+)?`")
ROOTS = (".", "common", "services/agent", "services/rollout", "services/reward", "services/trainer", "deploy/launch")


def documents() -> dict[str, str]:
    """Name and text of every committed document, except the changelog, which may name past files."""
    paths = [path for path in committed() if path.suffix == ".md" and path.name != "CHANGELOG.md"]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


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
