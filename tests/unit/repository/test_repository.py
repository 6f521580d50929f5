"""Rules about the repository's own files that no linter checks."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.unit.repository.dockerfile import versions_file

ROOT = Path(__file__).parents[3]
PACKAGES = ("common", "services", "deploy", "docs", "examples", "benchmarks")
MAX_APP_LINES = 150
# Homes and working folders of a machine (except those of u, user or you), and registries given by address.
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:home|root|Users|work|opt/pypi)/(?!u\b|user\b|you\b)[\w.-]+")
REGISTRY = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|index-url\s*=|https?://\S+/simple\b")
# The engine's own endpoints: a module that names one speaks its protocol.
ENGINE_PROTOCOL = re.compile(r"/(?:pause_generation|continue_generation|flush_cache|update_weights_from_\w+)\b")


@cache
def committed() -> tuple[Path, ...]:
    """Files that are, or would be, committed; without git, all files except products of a build."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    return tuple(path for name in listed if name and (path := ROOT / name).is_file())


def texts() -> list[tuple[str, str]]:
    """(name, content) of every committed text file but this one, the license and pictures."""
    skipped = {".png", ".svg", ".ico", ".gz"}
    files = [
        path for path in committed() if path.suffix not in skipped and path not in (Path(__file__), ROOT / "LICENSE")
    ]
    return [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in files]


def modules() -> list[tuple[str, str]]:
    return [(name, text) for name, text in texts() if name.endswith(".py")]


def test_no_app_is_too_long() -> None:
    apps = {name: len(text.splitlines()) for name, text in modules() if name.endswith("/app.py")}
    assert apps
    assert {name: length for name, length in apps.items() if length > MAX_APP_LINES} == {}


def test_every_module_says_what_it_owns() -> None:
    silent = [name for name, text in modules() if text.strip() and not text.lstrip().startswith(('"""', "#!", 'r"""'))]
    assert silent == []


def test_code_is_ascii() -> None:
    assert [name for name, text in modules() if not text.isascii()] == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = {name: match.group() for name, text in texts() if (match := MACHINE_PATH.search(text))}
    assert found == {}
    found = {name: match.group() for name, text in texts() if (match := REGISTRY.search(text))}
    assert found == {}


def test_only_its_own_package_speaks_sglangs_protocol() -> None:
    package = "services/rollout/penstock_rollout/engine/sglang/"
    speaking = [name for name, text in modules() if name.startswith(PACKAGES) and ENGINE_PROTOCOL.search(text)]
    assert [name for name in speaking if not name.startswith((package, "benchmarks/"))] == []


def test_constraints_pin_plain_versions() -> None:
    pin = re.compile(r"[\w.-]+==(?:\d+!)?[\w.]+")
    for name in ("services.txt", "sglang.txt"):
        lines = versions_file(name).read_text().splitlines()
        assert [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)] == []


@cache
def written_strings() -> tuple[tuple[str, str], ...]:
    """(file, text) of every string of the product, f-strings with their expressions as they are written."""
    found = []
    for path in committed():
        if path.suffix != ".py" or path.relative_to(ROOT).parts[0] not in PACKAGES:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
            if is_text or isinstance(node, ast.JoinedStr):
                found.append((str(path.relative_to(ROOT)), ast.unparse(node)))
    return tuple(found)


def test_nobody_is_advised_to_replace_a_run_without_a_word_on_its_deletion() -> None:
    offers = [(name, text) for name, text in written_strings() if re.search(r"run\.existing\W+(\w+ )*replace", text)]
    assert len(offers) >= 3
    assert [offer for offer in offers if not re.search(r"delet", offer[1])] == []
