"""`penstock.launch`: starts `penstock launch local` for a configuration that Python has.

Owns how the configuration reaches the launcher: as a file without a name, which is its standard input, so that no other
process can read it. Secrets travel in its environment. Its output goes to a file next to the run's folder, which the
launcher may delete.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from penstock.api.launcher import FolderBefore, StartedLauncher
from penstock.api.run import Run
from penstock.config import Config
from penstock.config.shown import as_yaml, secret_settings, without_secrets
from penstock.config.sources import without_settings
from penstock.errors import ConfigError
from penstock.records import RunRecords

OUTPUT_SUFFIX = ".launch.log"
OWNER_ONLY = 0o600
# Without the present folder among those where modules are looked for, as the command `penstock` has it.
COMMAND = ("-P", "-m", "penstock_launch", "launch", "local", "--config", "/dev/stdin")


def launch(config: Config) -> Run:
    """Start the run on this host, and return at once; it goes on when this process ends.

    ConfigError if it runs already, or its folder cannot be written. What the launcher finds out later is raised by
    `follow` and `wait`, and is in `state`. Used as `with penstock.launch(config) as run`, the block's end stops it.
    """
    records = RunRecords(Path(config.run.root) / config.run.name)
    state = records.state()
    if state.name == "running":
        raise ConfigError(
            f"run.name: {records.name!r} is running already ({state.reason}); expected another run.name, or "
            f"`penstock.open_run({str(records.folder)!r})` to follow or stop it"
        )
    output = records.folder.with_name(f"{records.name}{OUTPUT_SUFFIX}")
    before = FolderBefore(records.folder)
    with _opened(output) as file, tempfile.TemporaryFile() as handed:
        handed.write(as_yaml(without_secrets(config)).encode())
        handed.seek(0)
        begins = os.fstat(file.fileno()).st_size
        process = subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=handed,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**without_settings(os.environ), **secret_settings(config, config.redis)},
            start_new_session=True,
        )
    return Run(records, StartedLauncher(process, before, output, begins))


def _opened(path: Path) -> BinaryIO:
    """The file of the launcher's output: earlier launches are kept, and only the owner may read it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, OWNER_ONLY), "ab")
    except OSError as error:
        raise ConfigError(
            f"run.root: cannot write {path} ({error.strerror}); expected a folder that can be written"
        ) from None
