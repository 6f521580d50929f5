"""`penstock view`: serves the page of one or more runs on this host, until Ctrl-C.

Owns which runs the page shows, and where it listens. Invariant: the folders are only read; beyond this host nothing is
served without a token.
"""

import argparse
import asyncio
import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import SecretStr

from penstock.errors import ConfigError
from penstock.records import DEFAULT_ROOT, RunRecords, find_run, list_runs, newest_run
from penstock_launch.help_text import examples

PORT = 8642
TOKEN = "PENSTOCK_TOKEN"

Tell = Callable[[list[str]], object]


def add_view_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    view = commands.add_parser(
        "view",
        help="show runs in a browser: curves, groups, completions, tokens, evaluations",
        description="Serve a page that shows what the folders of runs hold, whether they run, have ended or were "
        "copied from elsewhere. Nothing is written. Without RUN: all runs of the folder of runs, the one that has "
        f"written last first. If {TOKEN} is set, the page asks for it. Ends with Ctrl-C.",
        epilog=examples(
            "penstock view",
            "penstock view first second",
            "penstock view /data/runs/mine --tokenizer models/mine",
            "penstock view --port 0",
            settings=False,
        ),
        usage="penstock view [RUN ...] [--root FOLDER] [--host HOST] [--port PORT] [--tokenizer FOLDER]",
        allow_abbrev=False,
    )
    view.add_argument("runs", nargs="*", metavar="RUN", help="a name in the folder of runs, or a folder")
    view.add_argument(
        "--root", metavar="FOLDER", default=DEFAULT_ROOT, help=f"folder of runs, run.root; default: {DEFAULT_ROOT}"
    )
    view.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help=f"where to listen; beyond this host only with {TOKEN}"
    )
    view.add_argument("--port", type=int, default=PORT, metavar="PORT", help=f"default: {PORT}; 0: any free one")
    view.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="of a model, if that of the run's configuration is not here"
    )


def view_runs(arguments: argparse.Namespace, environment: Mapping[str, str], tell: Tell) -> None:
    """Serve until Ctrl-C or SIGTERM; ConfigError if there is no such run, or it cannot listen there."""
    from penstock.runtime.service import Service
    from penstock.view.app import view_app
    from penstock.view.runs import Runs

    token = SecretStr(environment[TOKEN]) if environment.get(TOKEN) else None
    if token is None and not _is_loopback(arguments.host):
        raise ConfigError(f"--host {arguments.host}: expected an address of this host, such as 127.0.0.1, or {TOKEN}")
    runs = Runs(runs_of(arguments.runs, arguments.root), arguments.tokenizer)
    service = Service(arguments.host, arguments.port, "--port")
    tell([f"{service.url} shows {', '.join(runs.keys)}; Ctrl-C ends it"])
    asyncio.run(service.run(view_app(runs, token), until_stopped=_stopped(service.stop)))


async def _stopped(stop: asyncio.Event) -> None:
    await stop.wait()


def runs_of(names: list[str], root: str) -> list[RunRecords]:
    """The named runs, each once; without names all of `root`, the one that has written last first."""
    if names:
        return [find_run(name, root) for name in dict.fromkeys(names)]
    newest = newest_run(root)
    return [newest, *(each for each in list_runs(root) if each.folder != newest.folder)]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
