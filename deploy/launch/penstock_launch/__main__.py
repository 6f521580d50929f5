"""The `penstock` command: `penstock launch local`, `penstock config`, `penstock status`, `penstock export`.

Parses the words, calls, and turns Penstock's errors into one clear message and an exit code. Everything behind the
words (`--config FILE --key value ...`) goes to `penstock.settings` as it is.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from penstock.errors import PenstockError
from penstock.settings import load_config
from penstock.shown import masked
from penstock_launch.local import launch_local
from penstock_launch.status import show_status

SETTINGS_HELP = "--config FILE, then any keys of the configuration: --actor.group_size 8 --run.name mine ..."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and end the process with its exit code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """The exit code of the command `argv`."""
    started_at = time.time()
    arguments, settings = make_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="penstock: %(message)s")
    try:
        return _dispatch(arguments, settings, started_at)
    except PenstockError as error:
        print(f"penstock: {error.kind}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("penstock: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _dispatch(arguments: argparse.Namespace, settings: Sequence[str], started_at: float) -> int:
    config = load_config(settings)
    if arguments.command == "launch":
        return launch_local(config, os.environ, started_at)
    if arguments.command == "config":
        print(yaml.safe_dump(masked(config), sort_keys=False, allow_unicode=True), end="")
        return 0
    if arguments.command == "export":
        # Only this command needs torch, whose import takes seconds.
        from penstock_trainer.export_command import export_checkpoint

        name = export_checkpoint(config, arguments.checkpoint, arguments.out)
        print(f"checkpoint {name} is exported to {arguments.out}")
        return 0
    print("\n".join(show_status(config)))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """All that exists."""
    parser = argparse.ArgumentParser(
        prog="penstock", description="Train language models with GRPO as a set of asynchronous services."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    launch = commands.add_parser("launch", help="start a run and follow it to its end", allow_abbrev=False)
    places = launch.add_subparsers(dest="place", required=True, metavar="PLACE")
    places.add_parser(
        "local",
        help="all services on this host",
        description="Start the queue, the inference engines and all services on this host, and follow the run.",
        epilog=SETTINGS_HELP,
        usage="penstock launch local --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    commands.add_parser(
        "config",
        help="print the configuration as it is resolved, as YAML",
        epilog=SETTINGS_HELP,
        usage="penstock config --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    commands.add_parser(
        "status",
        help="print what a run does at the moment",
        epilog=SETTINGS_HELP,
        usage="penstock status --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    export = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder",
        epilog=SETTINGS_HELP,
        usage="penstock export --config FILE --out FOLDER [--checkpoint NAME] [--key value ...]",
        allow_abbrev=False,
    )
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    export.add_argument("--checkpoint", metavar="NAME", help="one of checkpoints/ in the run's folder; default: newest")
    return parser


if __name__ == "__main__":
    main()
