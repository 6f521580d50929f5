"""The command `penstock`: everything that can be done to a run.

Runs what the command line names (`command_line`), and turns Penstock's errors into one clear message and an exit code.
The arguments after the command (`--config FILE --key value ...`) go to `penstock.config.load` unchanged. Commands that
use services, or torch, import them when they run: another one must not depend on them, nor wait for them.
"""

from penstock_launch.interrupts import EXIT_CODE, heed  # first: it answers Ctrl-C during the other imports

# isort: split
import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from rich.console import Console

from penstock.config import Config
from penstock.config.load import given_keys, load_config
from penstock.errors import ConfigError
from penstock.quiet import quiet_libraries
from penstock.runtime.output import complain, flushed, tell
from penstock_launch.check.paths import require_paths, shown_paths
from penstock_launch.command_line import make_parser, split_words
from penstock_launch.commands.ask import ask_ledger
from penstock_launch.commands.cancel import cancel
from penstock_launch.commands.compare import compare_runs
from penstock_launch.commands.completion import SHELLS, completion_script
from penstock_launch.commands.dead import list_dead, retry_dead, show_dead
from penstock_launch.commands.keys import show_keys
from penstock_launch.commands.logs import show_logs
from penstock_launch.commands.runs import show_runs
from penstock_launch.commands.samples import show_samples
from penstock_launch.commands.show_config import non_defaults, resolved, schema
from penstock_launch.commands.status import show_run, status_config
from penstock_launch.commands.view import view_runs
from penstock_launch.envs.command import make_envs
from penstock_launch.exit_codes import exit_code_of
from penstock_launch.extras import extras_of, require
from penstock_launch.init.command import init
from penstock_launch.local import launch_local
from penstock_launch.on_ray.command import launch_ray
from penstock_launch.slurm.submit import launch_slurm
from penstock_launch.typed import Typed
from penstock_launch.watch.view import named_if_slow

heed()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and end the process with its exit code."""
    try:
        exit_code = run(sys.argv[1:] if argv is None else argv)
    except SystemExit as ended:  # argparse's, with or without a usage
        exit_code = int(ended.code or 0)
    except KeyboardInterrupt:  # before the command began; its own answer says more
        exit_code = EXIT_CODE
    sys.exit(flushed(exit_code))


def run(argv: Sequence[str]) -> int:
    """Run the command `argv`; returns its exit code."""
    given = argparse.Namespace(started_at=time.time())
    quiet_libraries(os.environ)
    arguments, settings = make_parser().parse_known_args(argv, given)
    logging.basicConfig(level=logging.WARNING, format="penstock: %(message)s")
    return exit_code_of(lambda: COMMANDS[arguments.command](arguments, settings))


def _init(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock init [FOLDER] [--agent] [--model MODEL]")
    print("\n".join(init(arguments.folder, os.environ, model=arguments.model, agent=arguments.agent)))
    return 0


def _launch(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    """Elsewhere than here, paths may be those of other hosts: only a launch on this one is refused for them."""
    config = load_config(settings)
    if arguments.place == "local":
        require("launch local", extras_of(config))
        with named_if_slow("looking at what the configuration names"):
            warnings = require_paths(config)
        _warn(warnings)
        return launch_local(config, os.environ, arguments.started_at, Typed.now("local", settings))
    _warn(shown_paths(config))
    if arguments.place == "ray":
        return launch_ray(config, os.environ, arguments.started_at, Typed.now("ray", settings))
    print("\n".join(launch_slurm(config, os.environ, render_only=arguments.render_only)))
    return 0


def _check(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    require("check", ["reward", "trainer"])
    from penstock_launch.check.command import check

    return check(settings, os.environ, generate=arguments.generate)


def _doctor(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    from penstock_launch.doctor.command import doctor

    return doctor(settings, os.environ)


def _envs(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock envs [--cpu | --cuda] [--folder FOLDER] [--python PYTHON]")
    return make_envs(arguments, os.environ)


def _config(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    if arguments.schema:
        _refuse_rest(settings, "penstock config --schema")
        print(schema(), end="")
        return 0
    config = load_config(settings)
    print(non_defaults(config) if arguments.changed else resolved(config, os.environ), end="")
    _warn(shown_paths(config))
    return 0


def _keys(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock keys WORD ...")
    print("\n".join(show_keys(arguments.words)))
    return 0


def _status(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    words, keys = split_words(settings)
    tell(show_run(status_config(words, keys, arguments.root)))
    return 0


def _runs(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock runs [ROOT]")
    print("\n".join(show_runs(arguments.root)))
    return 0


def _compare(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock compare RUN RUN ... [--root FOLDER]")
    print("\n".join(compare_runs(arguments.runs, arguments.root)))
    return 0


def _logs(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock logs [RUN] [SERVICE] [--errors] [--lines N] [--follow] [--root FOLDER]")
    show_logs(
        arguments.words,
        arguments.root,
        print,
        num_lines=arguments.lines,
        errors=arguments.errors,
        follow=arguments.follow,
    )
    return 0


def _cancel(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    print(cancel(load_config(settings)))
    return 0


def _samples(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock samples [RUN] and its options: penstock samples --help")
    text, exit_code = show_samples(arguments, Console())
    print(text, end="")
    return exit_code


def _view(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, "penstock view [RUN ...] and its options: penstock view --help")
    require("view", ["view"])
    view_runs(arguments, os.environ, tell)
    return 0


def _export(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    config = _with_trainer("export", settings)
    from penstock_trainer.offline.export import export_checkpoint

    name = export_checkpoint(config, arguments.checkpoint, arguments.out)
    print(f"checkpoint {name} is exported to {arguments.out}")
    return 0


def _replay(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    require("replay", ["trainer"])
    from penstock_trainer.offline.command import replay_bundle, replay_run

    if arguments.bundle is not None:
        return replay_bundle(arguments.bundle, settings, arguments.steps)
    config = _with_trainer("replay", settings)
    return replay_run(config, given_keys(settings), arguments.steps, partial(ask_ledger, config))


def _bundle(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    config = _with_trainer("bundle", settings)
    from penstock_trainer.offline.command import bundle_run

    ledger = partial(ask_ledger, config)
    return bundle_run(config, arguments.steps, ledger, arguments.out, with_model=arguments.with_model)


def _with_trainer(command: str, settings: Sequence[str]) -> Config:
    """The configuration, for a command that uses the trainer's packages; ConfigError if one is missing."""
    require(command, ["trainer"])
    config = load_config(settings)
    if config.actor.lora.rank > 0:
        require(command, ["trainer", "lora"])
    return config


def _dead(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    ids, settings = split_words(settings)
    config = load_config(settings)
    if arguments.action == "list":
        _refuse_rest(ids, "penstock dead list --config FILE [--key value ...]")
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


def _completion(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    _refuse_rest(settings, f"penstock completion {'|'.join(SHELLS)}")
    print(completion_script(make_parser(), arguments.shell))
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "init": _init,
    "launch": _launch,
    "check": _check,
    "doctor": _doctor,
    "envs": _envs,
    "config": _config,
    "keys": _keys,
    "runs": _runs,
    "compare": _compare,
    "logs": _logs,
    "status": _status,
    "cancel": _cancel,
    "samples": _samples,
    "view": _view,
    "export": _export,
    "replay": _replay,
    "bundle": _bundle,
    "dead": _dead,
    "completion": _completion,
}
"""What runs for each command: its own arguments, then those that go to the configuration. Returns the exit code."""


def _refuse_rest(words: Sequence[str], usage: str) -> None:
    """ConfigError if words are left that the command does not have."""
    if words:
        raise ConfigError(f"saw {words[0]!r}; expected {usage}")


def _warn(warnings: Iterable[str]) -> None:
    for each in warnings:
        complain(f"penstock: warning: {each}")


if __name__ == "__main__":
    main()
