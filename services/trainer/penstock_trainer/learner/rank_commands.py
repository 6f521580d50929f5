"""Several ranks as one learner: rank 0 sends commands, and all ranks carry them out together.

Owns the commands. Invariant: a command is broadcast before its first collective, and between commands the other ranks
wait only for the next one. So an error of rank 0 between two commands leaves no rank inside a collective. A rank that
fails ends its process, and torchrun ends the others.

    rank 0    LeadingLearner.begin -> broadcast Begin(groups) -> begin \\
                                                                        gathers, reduces: together
    rank n    follow -> wait for a command --------------------> begin /
"""

import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from penstock.config import Config
from penstock.config.changes import step_settings, with_step_settings
from penstock.contracts import Contract, ScoredGroup
from penstock.errors import PenstockError
from penstock.runtime.output import complain
from penstock_trainer.checkpoints.tensors import StateCopy
from penstock_trainer.distributed.rank import CPU_NICENESS, RankInfo
from penstock_trainer.distributed.ranks import Ranks, rank_device
from penstock_trainer.learner.keep_memory import keep_freed_memory
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import Gradient, PendingUpdate, StepResult
from penstock_trainer.weights.files import LazyWeights, Weights

log = logging.getLogger(__name__)

FAILED_WRITER_EXIT_CODE = 1

_encoder = msgspec.msgpack.Encoder()


class Begin(Contract, frozen=True, tag_field="command", tag="begin"):
    """Compute the gradient of a step on the weights of `version`: each rank makes the same batch and takes its share.

    num_steps: updates of the full run, which only rank 0 can compute. max_lag: staler tokens are masked.
    """

    groups: tuple[ScoredGroup, ...]
    version: int
    num_steps: int
    max_lag: int | None = None


class Finish(Contract, frozen=True, tag_field="command", tag="finish"):
    """Change the weights by the update that was begun."""


class ScoreSequence(Contract, frozen=True, tag_field="command", tag="score"):
    """Compute the log-probabilities of one sequence."""

    token_ids: tuple[int, ...]


class Gather(Contract, frozen=True, tag_field="command", tag="gather"):
    """Gather one full weight, merged with its adapter."""

    name: str


class Save(Contract, frozen=True, tag_field="command", tag="save"):
    """Copy the state, and write it into `folder` while training goes on."""

    folder: str


class Load(Contract, frozen=True, tag_field="command", tag="load"):
    """Go on from the checkpoint in `folder`."""

    folder: str


class Use(Contract, frozen=True, tag_field="command", tag="use"):
    """Go on with other settings: `settings` by key, as in `penstock.config.changes`. num_steps: see `Begin`."""

    settings: dict[str, Any]
    num_steps: int


class Stop(Contract, frozen=True, tag_field="command", tag="stop"):
    """End in order."""


Command = Begin | Finish | ScoreSequence | Gather | Save | Load | Use | Stop


class LeadingLearner(Learner):
    """The learner of rank 0: all ranks carry out its calls."""

    def __init__(self, config: Config, ranks: Ranks, *, num_steps: int = 0) -> None:
        super().__init__(config, ranks, num_steps=num_steps)
        self._group = ranks

    def begin(self, groups: Sequence[ScoredGroup], *, version: int, max_lag: int | None = None) -> PendingUpdate:
        self._command(Begin(tuple(groups), version, self.num_steps, max_lag))
        with self._group.computing():
            return super().begin(groups, version=version, max_lag=max_lag)

    def _finish(self, gradient: Gradient) -> StepResult:
        self._command(Finish())
        with self._group.computing():
            return super()._finish(gradient)

    def sequence_logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        self._command(ScoreSequence(tuple(token_ids)))
        with self._group.computing():
            return super().sequence_logprobs(token_ids)

    def weights(self) -> Weights:
        masters = self._masters if self._adapter is None else self._adapter.base(self._masters)
        return LazyWeights(self._policy.model, masters, self.full_weight)

    def full_weight(self, name: str) -> Tensor:
        self._command(Gather(name))
        with self._group.computing():
            return super().full_weight(name)

    def snapshot(self, folder: Path) -> StateCopy:
        self._command(Save(str(folder.resolve())))
        return super().snapshot(folder)

    def load(self, folder: Path) -> None:
        self._command(Load(str(folder.resolve())))
        super().load(folder)

    def use(self, config: Config, *, num_steps: int) -> None:
        self._command(Use(step_settings(config), num_steps))
        super().use(config, num_steps=num_steps)

    def close(self) -> None:
        self._command(Stop())

    def _command(self, command: Command) -> None:
        data = bytearray()
        _encoder.encode_into(command, data)
        self._group.broadcast(data)


def follow(config: Config, info: RankInfo) -> None:
    """Carry out the commands of rank 0 until Stop; RanksError if it ends without one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets it too, and stops all ranks in order
    if rank_device(config.trainer.device, info).type == "cpu":
        keep_freed_memory()
    ranks = Ranks(info, config.trainer.device)
    learner = Learner(config, ranks)
    if learner.on_cpu:
        os.nice(CPU_NICENESS)
    Follower(learner, ranks).run()
    ranks.leave()


class Follower:
    """A rank other than 0."""

    def __init__(self, learner: Learner, ranks: Ranks) -> None:
        self._learner = learner
        self._ranks = ranks
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: PendingUpdate | None = None

    def run(self) -> None:
        """Carry out commands until Stop, and finish the checkpoint that is being written."""
        while not isinstance(command := self._next(), Stop):
            with self._ranks.computing():
                self._carry_out(command)
        self._writer.shutdown()

    def _next(self) -> Command:
        command: Command = msgspec.msgpack.decode(self._ranks.broadcast(), type=Command)
        return command

    def _carry_out(self, command: Command) -> None:
        match command:
            case Begin(groups, version, num_steps, max_lag):
                self._learner.num_steps = num_steps
                self._pending = self._learner.begin(groups, version=version, max_lag=max_lag)
            case Finish():
                assert self._pending is not None, "rank 0 begins an update before it finishes it"
                self._pending.finish()
            case ScoreSequence(token_ids):
                self._learner.sequence_logprobs(token_ids)
            case Gather(name):
                self._learner.full_weight(name)
            case Save(folder):
                snapshot = self._learner.snapshot(Path(folder))
                self._writer.submit(snapshot.write, Path(folder)).add_done_callback(_end_on_error)
            case Load(folder):
                self._learner.load(Path(folder))
            case Use(settings, num_steps):
                self._learner.use(with_step_settings(self._learner.config, settings), num_steps=num_steps)


def _end_on_error(written: "Future[None]") -> None:
    """End the process at once: its main thread may be inside a collective, where no exception reaches it."""
    error = written.exception()
    if error is None:
        return
    with contextlib.suppress(OSError):
        complain(f"trainer: a rank cannot write its part of a checkpoint: {error}")
    os._exit(error.exit_code if isinstance(error, PenstockError) else FAILED_WRITER_EXIT_CODE)
