"""Which extras a run needs, and the line that a command ends with if they are not installed."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.extras import extras_of, metadata, require

DOCUMENT: dict[str, Any] = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}}
LINES = ("redis<9,>=7.3", "numpy; extra == 'rollout'", "numpy; extra == 'trainer'", "torch>=2.7; extra == 'trainer'")


def needed(path: str, **sections: Any) -> list[str]:
    return extras_of(Config.model_validate({**DOCUMENT, **sections}), path)


def test_a_run_needs_the_extras_of_its_keys() -> None:
    always = ["rollout", "reward", "trainer"]
    lora = {"path": "m", "lora": {"rank": 8}}
    assert needed("", actor=lora, tracking={"to": ["wandb"]}) == [*always, "launch", "lora", "wandb"]
    assert needed("", agent={"command": ["python", "agent.py"]}) == [*always, "launch", "agent"]


def test_a_host_with_a_queue_needs_no_other(tmp_path: Path) -> None:
    assert "launch" not in needed("", redis={"url": "redis://host:6379/0"})
    server = tmp_path / "redis-server"
    server.touch(mode=0o755)
    assert "launch" not in needed(str(tmp_path))


def test_what_is_missing_is_named_with_the_extras_that_bring_it() -> None:
    with pytest.raises(ConfigError) as raised:
        require("launch local", ["rollout", "trainer"], LINES, {"redis": "8.0"}.get)
    assert str(raised.value) == (
        "launch local needs packages that are not installed: numpy, torch; expected "
        "`pip install 'penstock[rollout,trainer]'`, or all extras: `pip install 'penstock[all]'`"
    )
    with pytest.raises(ConfigError, match=r"not installed: torch; expected `pip install 'penstock\[trainer\]'`"):
        require("export", ["trainer"], LINES, {"redis": "8.0", "numpy": "2.4"}.get)


def test_nothing_is_missing_if_the_extras_are_there() -> None:
    require("export", ["trainer"], LINES, {"numpy": "2.4", "torch": "2.14"}.get)
    require("launch local", ["rollout"], LINES, {"numpy": "2.4"}.get)
    require("export", ["trainer"], (), dict[str, str]().get)  # from source files alone: nothing is known


def test_the_installed_package_names_its_extras() -> None:
    assert any(line.startswith("torch") and "trainer" in line for line in metadata())
