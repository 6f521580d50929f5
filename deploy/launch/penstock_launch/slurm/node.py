"""`python -m penstock_launch.slurm.node ... -- COMMAND...`: one service on one node of the job.

srun starts it, inside the container if there is one. Owns what can only be done on the node: check that the run's
folder is visible, find a free port at which the trainer's ranks of several nodes meet, and write down where the service
runs. Invariant: the service does not outlive this process. It gets SIGTERM when standard input ends; this is how the
launcher asks it to end.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from penstock.errors import ConfigError, PenstockError
from penstock.records.files import CONFIG_FILE
from penstock.runtime.output import complain
from penstock.runtime.process import tied_command
from penstock_launch.slurm.attempt import Attempt, Whereabouts

PORT_SECONDS = 120.0  # nodes start a step at different times, and network file systems show files late
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as in a shell


def main(argv: Sequence[str]) -> int:
    """Run the service to its end; returns its exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--meet", metavar="HOST", help="the trainer's first node, if it has several")
    parser.add_argument("--num-hosts", type=int, default=1)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args(argv)
    service = arguments.attempt.rpartition("-")[0]
    try:
        return _run(arguments, os.environ)
    except PenstockError as error:
        complain(f"{service}: {error.kind}: {error}")
        return error.exit_code


def _run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    node = environ.get("SLURMD_NODENAME", socket.gethostname())
    index = int(environ.get("SLURM_PROCID", "0"))
    if not (arguments.run / CONFIG_FILE).is_file():
        raise ConfigError(
            f"run.root: {arguments.run} is not visible on node {node}; expected a file system that all nodes share, "
            "mounted in the container too if there is one"
        )
    attempt = Attempt(arguments.run, arguments.attempt)
    command = list(arguments.command)
    if arguments.meet is not None:
        port = _meeting_port(attempt, index)
        command += ["--meet", f"{arguments.meet}:{port}", "--num-hosts", str(arguments.num_hosts)]
        command += ["--host-index", str(index), "--blame", str(attempt.exit_path)]
    process = subprocess.Popen(tied_command(command), stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    if index == 0:
        attempt.write_whereabouts(Whereabouts(node, socket.gethostname(), process.pid))
    threading.Thread(target=_end_with_input, args=[process], daemon=True).start()
    exit_code = process.wait()
    return exit_code if exit_code >= 0 else SIGNAL_EXIT_CODE - exit_code


def _meeting_port(attempt: Attempt, index: int) -> int:
    """A port that is free on the first node; the other nodes read it from the attempt's file."""
    if index > 0:
        return attempt.wait_for_port(PORT_SECONDS)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    attempt.write_port(port)
    return port


def _end_with_input(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGTERM to the service once standard input ends. Nothing is ever written there."""
    while os.read(sys.stdin.fileno(), 4096):
        continue
    process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
