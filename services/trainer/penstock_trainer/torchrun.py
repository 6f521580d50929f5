"""`python -m penstock_trainer.torchrun --config F ...`: the trainer with trainer.num_ranks ranks on this host.

Owns how torchrun is called and what its end means: when one rank ends, all end, and this process ends with the exit
code of the rank that is to blame, which the launcher's restarts depend on. Started by the launcher; several hosts use
torchrun itself: `torchrun ... -m penstock_trainer --config F`.
"""

import logging
import sys
from collections.abc import Mapping, Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from penstock.errors import ConfigError, RanksError
from penstock.settings import load_config

SHUTDOWN_SECONDS = 110  # rank 0 ends its step and writes a checkpoint; the launcher waits a little longer
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as in a shell


def main(argv: Sequence[str]) -> int:
    """Run all ranks; the exit code."""
    try:
        num_ranks = load_config(argv).trainer.num_ranks
    except ConfigError as error:
        print(f"trainer: {error.kind}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks say themselves what went wrong
    try:
        run.run(run.parse_args([*torchrun_arguments(num_ranks), "--module", "penstock_trainer", *argv]))
    except ChildFailedError as failed:
        rank, failure = blamed(failed.failures)
        print(f"trainer: rank {rank} of {num_ranks} ended: {_ending(failure)}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else SIGNAL_EXIT_CODE - failure.exitcode
    except SignalException as stopped:
        return SIGNAL_EXIT_CODE + int(stopped.sigval)
    return 0


def torchrun_arguments(num_ranks: int) -> list[str]:
    """All ranks on this host, meeting on a free port of loopback; one life, since the launcher restarts."""
    return [
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={num_ranks}",
        "--max-restarts=0",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
    ]


def blamed(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Of the ranks that failed the first one, but before all those that only noticed the end of another."""
    return min(failures.items(), key=lambda item: (item[1].exitcode == RanksError.exit_code, item[1].timestamp))


def _ending(failure: ProcessFailure) -> str:
    return f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"killed by signal {-failure.exitcode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
