"""What an engine must do to serve here. To add one, implement `EngineServer` and `EngineClient`.

    EngineServer   starts the process and detects its death
    EngineClient   calls it: `generation` makes completions, `loading` replaces the weights, `memory` is the GPU's

Every call ends in one of these ways, whatever the engine's own protocol is:

    it answers                    the result
    it was not reached            EngineAbsentError
    its connection broke          EngineDiedError
    it did not answer in time     TimeoutError
    it refused the request        EngineRejectedError
    anything else                 EngineError
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from penstock.contracts import PauseMode, Sampling
from penstock.contracts.weight_sources import GroupRequest, SharedBucket, TensorSpec
from penstock_rollout.engine.types import CompletionRequest, EngineInfo, GroupAnswer


class EngineServer(Protocol):
    """A server that can be started, watched and stopped. `restartable`: whether this service may restart it."""

    url: str
    restartable: bool

    async def start(self) -> None:
        """Return when it answers; else EngineStartError; TransientStartError if the next start may succeed."""

    async def died(self) -> str:
        """Return the known reason once the server has ended by itself; never return after `stop`."""

    async def stop(self) -> None:
        """End it and all its descendants."""


class Generation(Protocol):
    """Generates completions, and pauses and resumes generation."""

    async def complete(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> GroupAnswer:
        """One answer per request, in their order, with log-probabilities of the sampled tokens.

        The seed decides what is sampled. The limit of tokens is each request's own, not the one in `sampling`.
        """

    async def prompt_logprobs(self, token_ids: Sequence[int], timeout_seconds: float) -> tuple[float, ...]:
        """log p of each token but the first, given those before it, at temperature 1; samples nothing."""

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """The texts of token sequences, without special tokens, as an uncut completion shows them."""

    async def pause(self, mode: PauseMode, timeout_seconds: float) -> None:
        """Stop generating; requests wait until `resume`. Returns when the running forward pass has ended."""

    async def resume(self) -> None:
        """Resume generation."""

    async def abort_all(self) -> None:
        """End every running request; their answers end with `abort`."""

    async def drop_prefixes(self, weight_version: str, *, flush: bool) -> None:
        """Never reuse a prefix that was computed before this call; later ones are by `weight_version`.

        `flush`: also free the memory of the old prefixes. Refused while requests run, or wait and keep their cache.
        """


class WeightLoading(Protocol):
    """Replaces the engine's weights. Generation is paused, except in `prefetch`, `join_group` and `leave_group`."""

    async def prefetch(self, folder: Path, timeout_seconds: float) -> None:
        """A hint during generation that these files are loaded next. It only saves time, and may do nothing."""

    async def load(self, folder: Path, weight_version: str, timeout_seconds: float) -> None:
        """Replace the weights by those in the folder. EngineError if not all were replaced."""

    async def join_group(self, request: GroupRequest) -> None:
        """Join a process group as its ranks from 1 on. Until all have joined, the engine does nothing else."""

    async def leave_group(self, name: str) -> None:
        """Forget a group that is not used any more."""

    async def begin(self) -> None:
        """Prepare for weights in buckets."""

    async def receive(
        self, group: str, tensors: Sequence[TensorSpec], weight_version: str | None, timeout_seconds: float
    ) -> None:
        """Replace these weights by the next broadcast in the group. `weight_version`: given with the last bucket."""

    async def load_shared(
        self, manager: str, bucket: SharedBucket, weight_version: str | None, timeout_seconds: float
    ) -> None:
        """Replace these weights by those in shared memory. `weight_version`: given with the last bucket."""

    async def end(self, timeout_seconds: float) -> None:
        """After the last bucket."""

    async def weight_version(self) -> str:
        """The version string that the server reports now."""

    async def compare(self, folder: Path, timeout_seconds: float) -> None:
        """WeightsMismatchError if the engine's bytes differ from the folder's, as far as the engine can report them."""


class GpuMemory(Protocol):
    """Gives GPU memory up, for a trainer that needs it. Generation is paused meanwhile, and no request runs.

    An engine without a GPU has nothing to give up, and answers all the same.
    """

    async def give_up(self, timeout_seconds: float) -> None:
        """Give up the memory of weights and key-value cache. What they hold is lost."""

    async def take_weights(self, timeout_seconds: float) -> None:
        """Take memory for the weights again; what they hold is undefined until they are loaded."""

    async def take_cache(self, timeout_seconds: float) -> None:
        """Take memory for the key-value cache again, which is empty."""


class EngineClient(Protocol):
    """Calls one server. Call `connect` after each start: the server's URL and limits may have changed."""

    @property
    def generation(self) -> Generation: ...

    @property
    def loading(self) -> WeightLoading: ...

    @property
    def memory(self) -> GpuMemory: ...

    @property
    def info(self) -> EngineInfo:
        """What the server reported when it was connected; EngineDiedError before that."""

    async def connect(self, url: str) -> EngineInfo:
        """Call the server at `url` from now on; returns its description."""

    async def close(self) -> None:
        """Stop calling the server; calls that still wait for an answer fail."""
