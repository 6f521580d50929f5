"""Kills a process of a run on this machine without a warning, as a crash does: SIGKILL.

`python -m examples.curriculum.kill runs/curriculum-killed trainer`, or `rollout`: the rollout service keeps the process
that started first, so what is killed is its SGLang.
"""

import os
import signal
import sys
from pathlib import Path

from penstock.errors import ConfigError
from penstock.records.processes import read_known

SERVICES = ("trainer", "rollout")


def victims(folder: Path, service: str) -> list[int]:
    """Process ids: the trainer's, or those that the rollout service has started. ConfigError if none is recorded."""
    found = [each for each in read_known(folder, folder.name) if each.service == service and each.identity.alive]
    chosen = found if service == "trainer" else found[1:]
    if service not in SERVICES or not chosen:
        raise ConfigError(
            f"{folder} has no live process of {service!r}: expected a run that is being launched here, and one of "
            f"{', '.join(SERVICES)}"
        )
    return [each.pid for each in chosen]


def main(folder: str, service: str) -> None:
    for pid in victims(Path(folder), service):
        os.kill(pid, signal.SIGKILL)
        print(f"killed {pid} ({service})")


if __name__ == "__main__":
    main(*sys.argv[1:])
