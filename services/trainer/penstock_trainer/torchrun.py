"""`python -m penstock_trainer.torchrun --config F ...`: the ranks of the trainer on this host.

Owns the call of torchrun and the meaning of its end: when one rank ends, all end, and this process ends with the exit
code of the rank that failed first, on which the launcher's restarts depend. The launcher starts it once with all
trainer.num_ranks, or on each of several hosts with a share of them; these hosts meet at `--meet`. A container starts it
with any number of ranks: if there is only one, this process becomes it.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.config.load import load_config
from penstock.errors import ConfigError, RanksError
from penstock.runtime.output import complain
from penstock.runtime.process import heeded

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHUTDOWN_SECONDS = 110  # rank 0 ends its step and writes a checkpoint; the launcher waits a little longer
MEET_SECONDS = 300  # hosts start at different times
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as in a shell


@dataclass(frozen=True)
class Meeting:
    """Several hosts: their meeting address, on the host with index 0, and the index of this host."""

    host: str
    port: int
    num_hosts: int
    index: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Meeting | None":
        """None without `--meet`: all ranks are on this host."""
        if arguments.meet is None:
            return None
        host, _, port = arguments.meet.rpartition(":")
        return cls(host, int(port), arguments.num_hosts, arguments.host_index)


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this host; the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--meet", metavar="HOST:PORT")
    parser.add_argument("--num-hosts", type=int, default=1)
    parser.add_argument("--host-index", type=int, default=0)
    parser.add_argument("--blame", type=Path, metavar="FILE", help="to be made by the first host with a rank to blame")
    arguments, settings = parser.parse_known_args(argv)
    exit_code, to_blame = _run(settings, Meeting.of(arguments))
    if to_blame and arguments.blame is not None:
        _record(arguments.blame, exit_code)
    return exit_code


def _run(settings: Sequence[str], meeting: Meeting | None) -> tuple[int, bool]:
    """The exit code, and whether a rank of this host is to blame for it."""
    try:
        num_ranks = load_config(settings).trainer.num_ranks
    except ConfigError as error:
        complain(f"trainer: {error.kind}: {error}")
        return error.exit_code, True
    if num_ranks == 1 and meeting is None:
        os.execv(sys.executable, [sys.executable, "-m", "penstock_trainer", *settings])
    # Importing torch takes seconds, which the only rank spends itself.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks report their own errors
    try:
        run.run(run.parse_args([*torchrun_arguments(num_ranks, meeting), "--module", "penstock_trainer", *settings]))
    except ChildFailedError as failed:
        rank, failure = blamed(failed.failures)
        complain(f"trainer: rank {rank} of {num_ranks} ended: {_ending(failure)}")
        exit_code = failure.exitcode if failure.exitcode > 0 else SIGNAL_EXIT_CODE - failure.exitcode
        return exit_code, exit_code != RanksError.exit_code
    except SignalException as stopped:
        return SIGNAL_EXIT_CODE + int(stopped.sigval), False
    return 0, False


def torchrun_arguments(num_ranks: int, meeting: Meeting | None = None) -> list[str]:
    """All ranks on a free port of loopback, or this host's share of them; no restarts, as the launcher restarts."""
    where = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={num_ranks}"]
    if meeting is not None:
        where = [
            f"--nnodes={meeting.num_hosts}",
            f"--node-rank={meeting.index}",
            f"--nproc-per-node={num_ranks // meeting.num_hosts}",
            f"--master-addr={meeting.host}",
            f"--master-port={meeting.port}",
            "--rdzv-backend=static",
            f"--rdzv-conf=timeout={MEET_SECONDS}",
        ]
    if not heeded(signal.SIGHUP):  # torchrun would take it for a request to stop
        where.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    return [*where, "--max-restarts=0", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]


def blamed(failures: Mapping[int, "ProcessFailure"]) -> tuple[int, "ProcessFailure"]:
    """The rank that failed first, not counting ranks that failed because another one ended."""
    return min(failures.items(), key=lambda item: (item[1].exitcode == RanksError.exit_code, item[1].timestamp))


def _ending(failure: "ProcessFailure") -> str:
    return f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"killed by signal {-failure.exitcode}"


def _record(path: Path, exit_code: int) -> None:
    """Write the exit code for the launcher of all hosts, unless another host was first."""
    try:
        with path.open("x", encoding="ascii") as file:
            file.write(str(exit_code))
    except FileExistsError:
        return
    except OSError as error:
        complain(f"trainer: {path} cannot be written ({error.strerror}): the launcher knows less of this end")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
