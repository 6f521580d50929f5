"""One request to an engine, as it answers it: nothing is continued, nothing is checked."""

from collections.abc import Sequence

from penstock.contracts import Sampling, unpack_int32
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.types import CompletionRequest, GroupAnswer


async def generate(engine: Engine, prompt_ids: bytes, seeds: Sequence[int], sampling: Sampling) -> GroupAnswer:
    """One completion of a prompt per seed. EngineDiedError unless there is an engine."""
    engine.require_up()
    prompt = tuple(unpack_int32(prompt_ids))
    requests = [CompletionRequest(prompt, seed, sampling.max_new_tokens) for seed in seeds]
    return await engine.client.generation.complete(requests, sampling)
