"""The `penstock` command: launch, doctor, envs, config, status, cancel, export, replay, bundle, dead.

Parses the command, runs it, and turns Penstock's errors into one clear message and an exit code. The arguments after
the command (`--config FILE --key value ...`) go to `penstock.config.load` unchanged.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from penstock.config import Config
from penstock.config.load import given_keys, load_config
from penstock.config.shown import as_yaml, masked
from penstock.errors import ConfigError
from penstock.quiet import quiet_libraries
from penstock.runtime.output import flushed
from penstock_launch.commands.ask import ask_ledger
from penstock_launch.commands.cancel import cancel
from penstock_launch.commands.dead import list_dead, retry_dead, show_dead
from penstock_launch.commands.status import show_status
from penstock_launch.doctor.arguments import add_doctor_parser
from penstock_launch.envs.command import add_envs_parser, make_envs
from penstock_launch.exit_codes import exit_code_of
from penstock_launch.extras import extras_of, require
from penstock_launch.gpus.shares import shown_placement
from penstock_launch.local import launch_local
from penstock_launch.on_ray.command import add_ray_parser, launch_ray
from penstock_launch.slurm.submit import launch_slurm

OFFLINE = ("export", "replay", "bundle")  # they need the trainer's extra, and no run
SETTINGS_HELP = "--config FILE, then any keys of the configuration: --actor.group_size 8 --run.name mine ..."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and end the process with its exit code."""
    try:
        exit_code = run(sys.argv[1:] if argv is None else argv)
    except SystemExit as ended:  # argparse's, with or without a usage
        exit_code = int(ended.code or 0)
    sys.exit(flushed(exit_code))


def run(argv: Sequence[str]) -> int:
    """Run the command `argv`; returns its exit code."""
    started_at = time.time()
    quiet_libraries(os.environ)
    arguments, settings = make_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="penstock: %(message)s")
    return exit_code_of(lambda: _dispatch(arguments, settings, started_at))


def _dispatch(arguments: argparse.Namespace, settings: Sequence[str], started_at: float) -> int:
    if arguments.command in OFFLINE:
        require(arguments.command, ["trainer"])
    if arguments.command == "replay" and arguments.bundle is not None:
        from penstock_trainer.offline.command import replay_bundle

        return replay_bundle(arguments.bundle, settings, arguments.steps)
    if arguments.command == "envs":
        return make_envs(arguments, settings, os.environ)
    if arguments.command == "doctor":
        # Only this command imports services: another one must not depend on what they import.
        from penstock_launch.doctor.command import doctor

        return doctor(settings, os.environ)
    ids, settings = split_words(settings) if arguments.command == "dead" else ([], settings)
    config = load_config(settings)
    if arguments.command in OFFLINE and config.actor.lora.rank > 0:
        require(arguments.command, ["trainer", "lora"])
    if arguments.command in ("replay", "bundle"):
        return _use_recording(arguments, config, settings)
    if arguments.command == "dead":
        return _handle_dead(arguments, config, ids)
    if arguments.command == "launch":
        if arguments.place == "local":
            require("launch local", extras_of(config))
            return launch_local(config, os.environ, started_at)
        if arguments.place == "ray":
            return launch_ray(config, os.environ, started_at)
        print("\n".join(launch_slurm(config, os.environ, render_only=arguments.render_only)))
        return 0
    if arguments.command == "cancel":
        print(cancel(config))
        return 0
    if arguments.command == "config":
        placement = "".join(f"# {line}\n" for line in shown_placement(config, os.environ))
        print(f"{as_yaml(masked(config))}{placement}", end="")
        return 0
    if arguments.command == "export":
        # Only this command needs torch, and its import takes seconds.
        from penstock_trainer.offline.export import export_checkpoint

        name = export_checkpoint(config, arguments.checkpoint, arguments.out)
        print(f"checkpoint {name} is exported to {arguments.out}")
        return 0
    print("\n".join(show_status(config)))
    return 0


def _use_recording(arguments: argparse.Namespace, config: Config, settings: Sequence[str]) -> int:
    from penstock_trainer.offline.command import bundle_run, replay_run

    ledger = partial(ask_ledger, config)
    if arguments.command == "replay":
        return replay_run(config, given_keys(settings), arguments.steps, ledger)
    return bundle_run(config, arguments.steps, ledger, arguments.out, with_model=arguments.with_model)


def _handle_dead(arguments: argparse.Namespace, config: Config, ids: Sequence[str]) -> int:
    if ids and arguments.action == "list":
        raise ConfigError(f"dead list: saw {ids[0]!r}; expected --config FILE and keys only")
    if arguments.action == "list":
        print("\n".join(list_dead(config)))
        return 0
    if arguments.action == "show":
        if len(ids) != 1:
            raise ConfigError(f"dead show: saw {len(ids)} ids; expected one that `penstock dead list` shows")
        print(show_dead(config, ids[0]))
        return 0
    lines, all_sent = retry_dead(config, ids, send_all=arguments.all)
    print("\n".join(lines))
    return 0 if all_sent else 1


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words, and the rest; argparse would count the value of an unknown flag among the words."""
    rest, plain, settings = list(words), [], []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest:
            settings.append(rest.pop(0))
    return plain, settings


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="penstock", description="Train language models with GRPO as a set of asynchronous services."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_launch(commands)
    add_doctor_parser(commands, SETTINGS_HELP)
    add_envs_parser(commands)
    commands.add_parser(
        "config",
        help="print the resolved configuration as YAML, and which GPUs of this host its processes would get",
        epilog=SETTINGS_HELP,
        usage="penstock config --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    commands.add_parser(
        "status",
        help="print the present state of a run",
        epilog=SETTINGS_HELP,
        usage="penstock status --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    commands.add_parser(
        "cancel",
        help="end a run in order",
        description="End a run of this host, or the Slurm job of a run: the trainer writes a checkpoint first, and the "
        "same launch command continues from it.",
        epilog=SETTINGS_HELP,
        usage="penstock cancel --config FILE [--key value ...]",
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
    export.add_argument(
        "--checkpoint", metavar="NAME", help="a name in checkpoints/ of the run's folder; default: the newest"
    )
    _add_recordings(commands)
    _add_dead(commands)
    return parser


def _add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    launch = commands.add_parser("launch", help="start a run", allow_abbrev=False)
    places = launch.add_subparsers(dest="place", required=True, metavar="PLACE")
    places.add_parser(
        "local",
        help="run all services on this host",
        description="Start the queue, the inference engines and all services on this host, and follow the run.",
        epilog=SETTINGS_HELP,
        usage="penstock launch local --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    add_ray_parser(places, SETTINGS_HELP)
    slurm = places.add_parser(
        "slurm",
        help="run all services in one job of a Slurm cluster",
        description="Submit one heterogeneous Slurm job that runs the queue, the inference engines and all services.",
        epilog=SETTINGS_HELP,
        usage="penstock launch slurm --config FILE [--render-only] [--key value ...]",
        allow_abbrev=False,
    )
    slurm.add_argument("--render-only", action="store_true", help="print the job script; submit and change nothing")


def _add_recordings(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    steps = "steps a to b-1, such as 10:20; a or b may be left out; default: all recorded steps"
    replay = commands.add_parser(
        "replay",
        help="train recorded steps again and compare the digests of their weights",
        description="Start from the newest checkpoint before the steps, train them again from their step files, and "
        "compare the digest of each step's weights with the recorded one. Needs no queue and no rollout server, and "
        "writes nothing. Exit code 1: a digest differs.",
        epilog=SETTINGS_HELP,
        usage="penstock replay (--config FILE | --bundle FILE) [--steps a:b] [--key value ...]",
        allow_abbrev=False,
    )
    replay.add_argument("--steps", default="", metavar="a:b", help=steps)
    replay.add_argument(
        "--bundle", type=Path, metavar="FILE", help="a file that `penstock bundle` wrote, instead of a run"
    )
    bundle = commands.add_parser(
        "bundle",
        help="pack recorded steps into one file that another machine can replay",
        description="Pack step files, configuration (secrets masked), digests, versions and the checkpoint to start "
        "from into a tar file for `penstock replay --bundle FILE`.",
        epilog=SETTINGS_HELP,
        usage="penstock bundle --config FILE --out FILE.tar[.gz] [--steps a:b] [--with-model] [--key value ...]",
        allow_abbrev=False,
    )
    bundle.add_argument("--steps", default="", metavar="a:b", help=steps)
    bundle.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .tar, .tar.gz or .tgz to be written")
    bundle.add_argument("--with-model", action="store_true", help="include the models of actor.path and ref.path")


def _add_dead(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    dead = commands.add_parser(
        "dead", help="list, show or resend dead letters: messages that no service could use", allow_abbrev=False
    )
    actions = dead.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser(
        "list",
        help="list all dead letters of a run",
        epilog=SETTINGS_HELP,
        usage="penstock dead list --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    actions.add_parser(
        "show",
        help="one of them, as JSON",
        description="Show the message with the ID that `penstock dead list` shows.",
        epilog=SETTINGS_HELP,
        usage="penstock dead show ID --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    retry = actions.add_parser(
        "retry",
        help="send some or all again, to the stage that they came from",
        description="Send dead letters again, by the IDs that `penstock dead list` shows. A letter is sent if its "
        "ticket is still outstanding, or if it has no ticket. Most tickets have ended; their letters stay where they "
        "are. Exit code 1: a letter that was named was not sent.",
        epilog=SETTINGS_HELP,
        usage="penstock dead retry (ID ... | --all) --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    retry.add_argument("--all", action="store_true", help="all that can be sent")


if __name__ == "__main__":
    main()
