"""Which orders, and which treatments of stale groups, the configuration accepts."""

from pathlib import Path

import pytest

from penstock.config import StalenessSection
from penstock.config.load import load_config
from penstock.errors import ConfigError


def section(tmp_path: Path, *arguments: str) -> StalenessSection:
    base = tmp_path / "base.yaml"
    base.write_text("actor: {path: some/model}\ndata: {train: {path: prompts.jsonl}}\n")
    return load_config(["--config", str(base), *arguments], {}).staleness


def test_ticket_order_is_the_default_and_masks_nothing(tmp_path: Path) -> None:
    found = section(tmp_path)
    assert (found.order, found.on_stale, found.max_lag) == ("ticket", "drop", None)


def test_only_mask_has_a_largest_lag(tmp_path: Path) -> None:
    ready = ("--staleness.order", "ready", "--staleness.max_staleness", "3")
    assert section(tmp_path, *ready).max_lag is None
    assert section(tmp_path, *ready, "--staleness.on_stale", "mask").max_lag == 3


def test_masking_in_ticket_order_is_refused_with_reason_and_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        section(tmp_path, "--staleness.on_stale", "mask")
    text = str(error.value)
    assert "staleness.on_stale is mask with staleness.order ticket" in text
    assert "is issued again" in text
    assert "set staleness.order to ready" in text


def test_an_unknown_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"staleness\.order"):
        section(tmp_path, "--staleness.order", "fifo")
