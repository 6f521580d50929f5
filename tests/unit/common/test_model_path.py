"""What of a path counts as a folder, and what as a name on the hub."""

from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.model_path import check_model_path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    (tmp_path / "models" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", ["models/mine", "owner/name", "name", "./models/mine"])
def test_a_folder_and_a_possible_name_are_taken(path: str) -> None:
    check_model_path(path, "actor.path")


@pytest.mark.parametrize("path", ["./none", "/none", "a/b/c", "models/mien"])
def test_what_does_not_exist_is_named(path: str) -> None:
    """The last one would be a name on the hub, if `models` were no folder here."""
    with pytest.raises(ConfigError, match=r"actor\.path is .*, which does not exist: expected"):
        check_model_path(path, "actor.path")


def test_a_folder_without_a_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'models/empty', a folder without config\.json"):
        check_model_path("models/empty", "actor.path")
