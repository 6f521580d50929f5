"""The command line of `penstock`: its commands, their words, and the help of each.

Commands of many words have their parser beside what they do.
"""

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from penstock.records import DEFAULT_ROOT
from penstock_launch.check.arguments import add_check_parser
from penstock_launch.commands.completion import SHELLS
from penstock_launch.commands.samples import add_samples_parser
from penstock_launch.commands.view import add_view_parser
from penstock_launch.doctor.arguments import add_doctor_parser
from penstock_launch.envs.command import add_envs_parser
from penstock_launch.help_text import CommandParser, examples
from penstock_launch.init.command import SMALL_MODEL
from penstock_launch.on_ray.command import add_ray_parser


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser: argparse.ArgumentParser = CommandParser(
        prog="penstock",
        description="Train language models with GRPO as a set of asynchronous services.",
        epilog=examples("penstock init my-task", "penstock launch local --help", settings=False),
    )
    parser.add_argument("--version", action="version", version=f"penstock {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_init(commands)
    _add_launch(commands)
    add_check_parser(
        commands, examples("penstock check --config my_run.yaml", "penstock check --config my_run.yaml --generate")
    )
    add_doctor_parser(commands, examples("penstock doctor", "penstock doctor --config my_run.yaml"))
    add_envs_parser(commands)
    _add_config(commands)
    _add_looks(commands)
    status = commands.add_parser(
        "status",
        help="print the present state of a run",
        description="Print the present state of a run, or how it ended. RUN is a name in the folder of runs, or a "
        "folder. Without RUN and --config: the run that has written last.",
        epilog=examples("penstock status", "penstock status my-run", "penstock status --config my_run.yaml"),
        usage="penstock status [RUN | --config FILE] [--key value ...] [--root FOLDER]",
        allow_abbrev=False,
    )
    status.add_argument(
        "--root", default=DEFAULT_ROOT, metavar="FOLDER", help=f"folder of runs, run.root; default: {DEFAULT_ROOT}"
    )
    commands.add_parser(
        "cancel",
        help="end a run in order",
        description="End a run of this host, or the Slurm job of a run: the trainer writes a checkpoint first, and the "
        "same launch command continues from it.",
        epilog=examples("penstock cancel --config my_run.yaml"),
        usage="penstock cancel --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    export = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder",
        epilog=examples(
            "penstock export --config my_run.yaml --out model",
            "penstock export --config my_run.yaml --out model --checkpoint 00000050.1",
            "penstock export --config my_run.yaml --out model --checkpoint best",
        ),
        usage="penstock export --config FILE --out FOLDER [--checkpoint NAME] [--key value ...]",
        allow_abbrev=False,
    )
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    export.add_argument(
        "--checkpoint", metavar="NAME", help="a name in checkpoints/ of the run's folder, or best; default: the newest"
    )
    add_samples_parser(commands)
    add_view_parser(commands)
    _add_recordings(commands)
    _add_dead(commands)
    _add_completion(commands)
    return parser


def _add_init(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "init",
        help="write a configuration, a reward function and a few prompts to begin a task of one's own with",
        description="Write files that train as they are: a configuration with comments, a reward function, prompts. "
        "The configuration fits this host. No file is overwritten.",
        epilog=examples("penstock init my-task", "penstock init my-game --agent --model path/to/model", settings=False),
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("."), metavar="FOLDER", help="default: the present one"
    )
    parser.add_argument("--agent", action="store_true", help="an environment of several turns, instead of a reward")
    parser.add_argument(
        "--model", default=SMALL_MODEL, help=f"a Hugging Face folder or hub name; default: {SMALL_MODEL}"
    )


def _add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    launch = commands.add_parser("launch", help="start a run", allow_abbrev=False)
    places = launch.add_subparsers(dest="place", required=True, metavar="PLACE")
    places.add_parser(
        "local",
        help="run all services on this host",
        description="Start the queue, the inference engines and all services on this host, and follow the run.",
        epilog=examples(
            "penstock launch local --config my_run.yaml",
            "penstock launch local --config my_run.yaml --config examples/presets/dapo.yaml --run.max_steps 5",
        ),
        usage="penstock launch local --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    add_ray_parser(places, examples("penstock launch ray --config my_run.yaml --ray.address auto"))
    slurm = places.add_parser(
        "slurm",
        help="run all services in one job of a Slurm cluster",
        description="Submit one heterogeneous Slurm job that runs the queue, the inference engines and all services.",
        epilog=examples(
            "penstock launch slurm --config my_run.yaml --config deploy/slurm/cluster.yaml",
            "penstock launch slurm --config my_run.yaml --render-only",
        ),
        usage="penstock launch slurm --config FILE [--render-only] [--key value ...]",
        allow_abbrev=False,
    )
    slurm.add_argument("--render-only", action="store_true", help="print the job script; submit and change nothing")


def _add_looks(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Commands that look at the folders of runs, and need no configuration."""
    root: dict[str, str] = {"default": DEFAULT_ROOT, "help": f"folder of runs, run.root; default: {DEFAULT_ROOT}"}
    runs = commands.add_parser(
        "runs",
        help="list the runs of a folder: state, steps, rewards, time",
        epilog=examples("penstock runs", "penstock runs /data/runs", settings=False),
        allow_abbrev=False,
    )
    runs.add_argument("root", nargs="?", metavar="ROOT", default=root["default"], help=root["help"])
    compare = commands.add_parser(
        "compare",
        help="show how runs differ: configuration, figures, rewards after the same steps",
        epilog=examples("penstock compare first second", "penstock compare runs/a /data/runs/b", settings=False),
        usage="penstock compare RUN RUN [RUN ...] [--root FOLDER]",
        allow_abbrev=False,
    )
    compare.add_argument("runs", nargs="*", metavar="RUN", help="a name in the folder of runs, or a folder")
    compare.add_argument("--root", metavar="FOLDER", default=root["default"], help=root["help"])
    logs = commands.add_parser(
        "logs",
        help="print the logs of a run, merged by time",
        description="Print the logs of a run's services, merged by time, in UTC. Without RUN: of the run that has "
        "logged last. Without SERVICE: all logs.",
        epilog=examples(
            "penstock logs", "penstock logs my-run trainer --follow", "penstock logs my-run --errors", settings=False
        ),
        usage="penstock logs [RUN] [SERVICE] [--errors] [--lines N] [--follow] [--root FOLDER]",
        allow_abbrev=False,
    )
    logs.add_argument(
        "words", nargs="*", metavar="RUN SERVICE", help="a name in the folder of runs, or a folder; the name of a log"
    )
    logs.add_argument("--errors", action="store_true", help="only warnings and errors")
    logs.add_argument(
        "--lines", type=_not_negative, default=100, metavar="N", help="the last N entries, 0: all; default: 100"
    )
    logs.add_argument("--follow", action="store_true", help="print new entries until the run ends, or Ctrl-C")
    logs.add_argument("--root", metavar="FOLDER", default=root["default"], help=root["help"])


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"saw {text!r}; expected a number of entries, or 0 for all")
    return int(text)


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    config = commands.add_parser(
        "config",
        help="print the resolved configuration as YAML, and which GPUs of this host its processes would get",
        epilog=examples(
            "penstock config --config my_run.yaml --changed",
            "penstock config --config my_run.yaml --optimizer.lr 2e-6",
            "penstock config --schema > config.schema.json",
        ),
        usage="penstock config --config FILE [--changed] [--key value ...]\n       penstock config --schema",
        allow_abbrev=False,
    )
    config.add_argument(
        "--changed", action="store_true", help="only what differs from the defaults, as a file for --config"
    )
    config.add_argument("--schema", action="store_true", help="the JSON schema of such files, for editors")
    keys = commands.add_parser(
        "keys",
        help="find keys of the configuration by name, meaning, or what TRL, verl, AReaL and OpenRLHF call them",
        description="Print the keys that all of the words find, with type, default and meaning. Exit code 1: none.",
        epilog=examples(
            "penstock keys learning_rate", "penstock keys rollout.n", "penstock keys staleness", settings=False
        ),
        usage="penstock keys [WORD ...]",
        allow_abbrev=False,
    )
    keys.add_argument("words", nargs="*", metavar="WORD", help="a key, a part of its name, or a word; none: all keys")


def _add_completion(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script with which your shell completes commands, flags and keys",
        description="Print a script with which bash, zsh or fish completes commands, flags, keys of the configuration "
        "and their choices. Write it again after an upgrade.",
        epilog=examples(
            "penstock completion bash > ~/.local/share/bash-completion/completions/penstock",
            "penstock completion zsh > ~/.zfunc/_penstock",
            "penstock completion fish > ~/.config/fish/completions/penstock.fish",
            settings=False,
        ),
        allow_abbrev=False,
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join(SHELLS))


def _add_recordings(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    steps = "steps A to B, such as 11:20, or one; A or B may be left out; default: all recorded steps"
    replay = commands.add_parser(
        "replay",
        help="train recorded steps again and compare the digests of their weights",
        description="Start from the newest checkpoint before the steps, train them again from their step files, and "
        "compare the digest of each step's weights with the recorded one. Needs no queue and no rollout server, and "
        "writes nothing. Exit code 1: a digest differs.",
        epilog=examples("penstock replay --config my_run.yaml --steps 11:20", "penstock replay --bundle steps.tar.gz"),
        usage="penstock replay (--config FILE | --bundle FILE) [--steps A:B] [--key value ...]",
        allow_abbrev=False,
    )
    replay.add_argument("--steps", default="", metavar="A:B", help=steps)
    replay.add_argument(
        "--bundle", type=Path, metavar="FILE", help="a file that `penstock bundle` wrote, instead of a run"
    )
    bundle = commands.add_parser(
        "bundle",
        help="pack recorded steps into one file that another machine can replay",
        description="Pack step files, configuration (secrets masked), digests, versions and the checkpoint to start "
        "from into a tar file for `penstock replay --bundle FILE`.",
        epilog=examples("penstock bundle --config my_run.yaml --out steps.tar.gz --steps 11:20 --with-model"),
        usage="penstock bundle --config FILE --out FILE.tar[.gz] [--steps A:B] [--with-model] [--key value ...]",
        allow_abbrev=False,
    )
    bundle.add_argument("--steps", default="", metavar="A:B", help=steps)
    bundle.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .tar, .tar.gz or .tgz to be written")
    bundle.add_argument("--with-model", action="store_true", help="include all models that it loads")


def _add_dead(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    dead = commands.add_parser(
        "dead", help="list, show or resend dead letters: messages that no service could use", allow_abbrev=False
    )
    actions = dead.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser(
        "list",
        help="list all dead letters of a run",
        epilog=examples("penstock dead list --config my_run.yaml"),
        usage="penstock dead list --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    actions.add_parser(
        "show",
        help="one of them, as JSON",
        description="Show the message with the ID that `penstock dead list` shows.",
        epilog=examples("penstock dead show 1764493260000-0 --config my_run.yaml"),
        usage="penstock dead show ID --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    retry = actions.add_parser(
        "retry",
        help="send some or all again, to the stage that they came from",
        description="Send dead letters again, by the IDs that `penstock dead list` shows. A letter is sent if its "
        "ticket is still outstanding, or if it has no ticket. Most tickets have ended; their letters stay where they "
        "are. Exit code 1: a letter that was named was not sent.",
        epilog=examples(
            "penstock dead retry 1764493260000-0 --config my_run.yaml", "penstock dead retry --all --config my_run.yaml"
        ),
        usage="penstock dead retry (ID ... | --all) --config FILE [--key value ...]",
        allow_abbrev=False,
    )
    retry.add_argument("--all", action="store_true", help="all that can be sent")


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


def own_version() -> str:
    """The version of the installed package."""
    try:
        return version("penstock")
    except PackageNotFoundError:
        return "(not installed)"
