"""Kills a process of a run on this machine without a warning, as a crash does: SIGKILL.

`python -m examples.curriculum.kill runs/curriculum-killed trainer`, or `rollout`: the rollout service keeps the process
that started first, so what is killed is its SGLang.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
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


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.curriculum.kill")
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("service", help=" or ".join(SERVICES))
    given = parser.parse_args(arguments)
    try:
        pids = victims(given.folder, given.service)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        print(f"killed {pid} ({given.service})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
