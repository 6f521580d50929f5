"""The tables of docs/gpu.md."""

import pytest

from docs import generate_fits
from docs.generate_fits import BEGIN, END, filled


def test_tables_are_written_between_the_markers_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_fits, "MODELS", {"0.5B": generate_fits.MODELS["0.5B"]})
    monkeypatch.setattr(generate_fits, "MEMORY_MIB", {"4 GB": 4096, "80 GB": 81559})
    page = filled(f"before\n{BEGIN}\nold\n{END}\nafter")
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"{END}\nafter")
    assert "old" not in page
    assert filled(page) == page
    one, two, eight = (line for line in page.splitlines() if line.startswith("| 0.5B"))
    assert one.split("|")[2:4] == [" - ", " 16384 "]
    assert two.split("|")[2:4] == [" - ", " 16384 "]
    assert eight.split("|")[3] == " 4 x 1 + 4: 16384 "


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        filled(f"{BEGIN}, and no end")
