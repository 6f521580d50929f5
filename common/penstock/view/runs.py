"""The runs that one page shows, each under a key that addresses name it by."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.records import RunRecords
from penstock.view.run import RunView


class Runs:
    """Some runs, in the order in which they were given. Invariant: keys differ, also if names do not."""

    def __init__(self, records: Iterable[RunRecords], tokenizer: Path | None = None) -> None:
        self._views: dict[str, RunView] = {}
        for each in records:
            same = sum(view.split("~")[0] == each.name for view in self._views)
            key = f"{each.name}~{same + 1}" if same else each.name
            self._views[key] = RunView(key, each, tokenizer)

    def of(self, key: str) -> RunView:
        """The run of a key; ConfigError names those that there are."""
        if key not in self._views:
            raise ConfigError(f"saw run {key[:80]!r}; expected one of {', '.join(self.keys)}")
        return self._views[key]

    @property
    def keys(self) -> Sequence[str]:
        return list(self._views)

    def list(self) -> list[dict[str, Any]]:
        """What each run is, and its state."""
        return [{"key": key, **_state(view)} for key, view in self._views.items()]


def _state(view: RunView) -> dict[str, Any]:
    state = view.state()
    return {"state": state.name, "reason": state.reason, "folder": view.folder}
