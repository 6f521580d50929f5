"""The configuration with which each step was trained, as text beside the step files.

Owns `steps/settings-<digest>.json`, which holds the keys that matter to training; a step's record in the ledger has the
digest. Invariant: a file is flushed before the ledger names it, and it never changes. There are as many files as
configurations, so they are never deleted.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import xxhash

from penstock.config import Config
from penstock.config.changes import Settings, settings_of, step_settings, with_step_settings
from penstock.contracts.ledger import StepRecord
from penstock.durable import write_durably
from penstock.errors import DataError
from penstock.records.extent import expected_steps


class SettingsFiles:
    """The settings in a folder of step files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: str) -> Path:
        """The file of the settings with this digest."""
        return self._folder / f"settings-{digest}.json"

    def write(self, config: Config) -> str:
        """Write the settings of a configuration durably, unless they are there; their digest."""
        data = json.dumps(settings_of(config), indent=1, sort_keys=True).encode()
        digest = xxhash.xxh3_64_hexdigest(data)
        if not self.path(digest).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(self.path(digest), data)
        return digest

    def read(self, digest: str) -> Settings:
        """Settings by their digest; DataError if the file is missing or is not what was written."""
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); expected the configuration of recorded steps, which is "
                "needed to train them again"
            ) from None
        if (found := xxhash.xxh3_64_hexdigest(data)) != digest:
            raise DataError(f"{path} has digest {found}: expected the configuration with the digest in its name")
        settings: Settings = json.loads(data)
        return settings


@dataclass(frozen=True)
class StepConfigs:
    """The configuration of each recorded step: its own values of the keys that decide a step, else those of `config`.

    dataset_length: rows, on which the number of steps of a run depends. overridden: keys whose value in `config` holds
    for recorded steps, too.
    """

    config: Config
    dataset_length: int
    files: SettingsFiles
    overridden: Collection[str] = ()

    def of(self, step: StepRecord) -> Config:
        """DataError if the settings of the step cannot be read. An older ledger names none: those of `config`."""
        if not step.settings:
            return self.config
        own = step_settings(self.config)
        recorded = self.files.read(step.settings) | {key: own[key] for key in self.overridden if key in own}
        return with_step_settings(self.config, recorded)

    def num_steps(self, config: Config) -> int:
        """Steps of the full run, over which a learning rate may fall."""
        num_draws = config.total_train_epochs * self.dataset_length
        return expected_steps(num_draws, config.data.batch_size, config.run.max_steps)
