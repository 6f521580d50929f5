"""An engine inside the process of its rollout service: no model and no server, but the same calls and the same answers.

Owns which version sampled each token. A completion lasts as long as its seed says; its tokens are spread evenly over
that time, and each is by the version that was loaded then. Tokens and log-probabilities are those of the pure engine of
the chaos runs: a function of prompt, seed, position and version. It verifies no canary, since it computes no model.
"""

import asyncio
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.chaos.engine import sample
from benchmarks.chaos.model import LETTERS, SPECIAL
from penstock.contracts import PauseMode, Sampling
from penstock.contracts.weight_sources import GroupRequest, SharedBucket, TensorSpec
from penstock.errors import WeightsError
from penstock_rollout.engine.types import Answer, AnsweredSpan, CompletionRequest, EngineInfo, GroupAnswer

CONTEXT_LENGTH = 256
CACHE_TOKENS = 2**20
LOAD_SECONDS = 0.05
SHORTEST, LONGEST = 0.5, 1.5  # of a completion's time, in the mean's
KNOWN_LOADS = 64  # more than any completion meets
VOCABULARY = (*SPECIAL, *LETTERS)


class LetterEngine:
    """One engine: its server, its client and all parts of that."""

    def __init__(self, mean_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`mean_seconds`: of a completion."""
        self._clock = clock
        self.url = "http://127.0.0.1:1"  # nobody calls it
        self.restartable = True
        self.began = asyncio.Event()
        """Set once its service has connected to it."""
        self._mean_seconds = mean_seconds
        self._loads: deque[tuple[float, str]] = deque([(0.0, "none")], maxlen=KNOWN_LOADS)
        self._going_on = asyncio.Event()
        self._going_on.set()
        self._aborted = asyncio.Event()

    @property
    def generation(self) -> "LetterEngine":
        return self

    @property
    def loading(self) -> "LetterEngine":
        return self

    @property
    def memory(self) -> "LetterEngine":
        return self

    @property
    def info(self) -> EngineInfo:
        _, version = self._loads[-1]
        return EngineInfo("letters 1", version, CONTEXT_LENGTH, CACHE_TOKENS, CONTEXT_LENGTH, len(VOCABULARY), "cpu", 1)

    # The server.

    async def start(self) -> None:
        """It answers at once."""

    async def died(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    async def stop(self) -> None:
        self._aborted.set()

    # The client.

    async def connect(self, url: str) -> EngineInfo:
        self.began.set()
        return self.info

    async def close(self) -> None:
        """There is no connection."""

    # Generation.

    async def complete(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> GroupAnswer:
        """All completions of a group begin together; the longest one decides when it is answered."""
        began, aborted = self._clock(), self._aborted
        durations = [self._duration(each.seed) for each in requests]
        try:
            async with asyncio.timeout(max(durations)):
                await aborted.wait()
        except TimeoutError:
            await self._going_on.wait()
        elapsed = self._clock() - began if aborted.is_set() else max(durations)
        return tuple(
            self._answer(each, sampling, began, duration, elapsed)
            for each, duration in zip(requests, durations, strict=True)
        )

    def _duration(self, seed: int) -> float:
        share = (seed * 2654435761 % 2**32) / 2**32
        return self._mean_seconds * (SHORTEST + (LONGEST - SHORTEST) * share)

    def _answer(
        self, request: CompletionRequest, sampling: Sampling, began: float, duration: float, elapsed: float
    ) -> Answer:
        prompt = struct.pack(f"<{len(request.prompt_ids)}i", *request.prompt_ids)
        most = request.max_new_tokens
        tokens, logprobs, spans = array("i"), array("f"), list[AnsweredSpan]()
        finish, stop_tokens = "length", set(sampling.stop_token_ids)
        for position in range(most):
            after = duration * (position + 1) / most
            if after > elapsed:
                finish = "abort"
                break
            version = self._version_at(began + after)
            token, logprob = sample(version.encode(), prompt, request.seed, position, len(VOCABULARY))
            tokens.append(token)
            logprobs.append(logprob)
            if spans and spans[-1].weight_version == version:
                spans[-1] = AnsweredSpan(version, spans[-1].start, position + 1)
            else:
                spans.append(AnsweredSpan(version, position, position + 1))
            if token in stop_tokens:
                finish = "stop"
                break
        text = "".join(VOCABULARY[token] for token in tokens if token >= len(SPECIAL))
        return Answer(tokens, logprobs, tuple(spans), text, finish, self._loads[-1][1])  # type: ignore[arg-type]

    def _version_at(self, moment: float) -> str:
        return next((version for at, version in reversed(self._loads) if at <= moment), self._loads[0][1])

    async def prompt_logprobs(self, token_ids: Sequence[int], timeout_seconds: float) -> tuple[float, ...]:
        raise WeightsError("this engine computes no model; expected weights.canary_tokens = 0")

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(VOCABULARY[token] for token in each if token >= len(SPECIAL)) for each in tokens]

    async def pause(self, mode: PauseMode, timeout_seconds: float) -> None:
        self._going_on.clear()

    async def resume(self) -> None:
        self._going_on.set()

    async def abort_all(self) -> None:
        self._aborted.set()
        self._aborted = asyncio.Event()

    async def drop_prefixes(self, weight_version: str, *, flush: bool) -> None:
        """It keeps none."""

    # Weights.

    async def prefetch(self, folder: Path, timeout_seconds: float) -> None:
        """The service reads the files to verify them; this engine needs only their version."""

    async def load(self, folder: Path, weight_version: str, timeout_seconds: float) -> None:
        await asyncio.sleep(LOAD_SECONDS)
        self._loads.append((self._clock(), weight_version))

    async def weight_version(self) -> str:
        return self._loads[-1][1]

    async def compare(self, folder: Path, timeout_seconds: float) -> None:
        """It holds no bytes."""

    async def join_group(self, request: GroupRequest) -> None:
        raise WeightsError(_ONLY_FILES)

    async def leave_group(self, name: str) -> None:
        raise WeightsError(_ONLY_FILES)

    async def begin(self) -> None:
        raise WeightsError(_ONLY_FILES)

    async def receive(
        self, group: str, tensors: Sequence[TensorSpec], weight_version: str | None, timeout_seconds: float
    ) -> None:
        raise WeightsError(_ONLY_FILES)

    async def load_shared(
        self, manager: str, bucket: SharedBucket, weight_version: str | None, timeout_seconds: float
    ) -> None:
        raise WeightsError(_ONLY_FILES)

    async def end(self, timeout_seconds: float) -> None:
        raise WeightsError(_ONLY_FILES)

    # GPU memory, of which it has none.

    async def give_up(self, timeout_seconds: float) -> None:
        """Nothing to give up."""

    async def take_weights(self, timeout_seconds: float) -> None:
        """Nothing to take."""

    async def take_cache(self, timeout_seconds: float) -> None:
        """Nothing to take."""


_ONLY_FILES = "this engine loads files only; expected weights.transport = disk"
