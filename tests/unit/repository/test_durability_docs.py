"""docs/durability.md: each test that it names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "durability.md").read_text()))
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    present = {name for text in sources for name in re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE)}
    assert len(named) > 20
    assert named <= present, f"missing: {sorted(named - present)}"
