"""The engine of the kit: its configuration, by what the user gave.

Owns what differs between a GPU and the CPU form.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder
from penstock.config import EngineSection
from penstock_rollout.engine.sglang.server import StartedServer

T = TypeVar("T")
MEMORY_FRACTION = 0.4  # of the GPU: a trainer of a small model is on it too
START_SECONDS = 300.0  # the first start on a machine compiles kernels


def engine_section(options: Options, **keys: Any) -> dict[str, Any]:
    """The section `rollout.engine`."""
    return {
        "python": str(options.engine_python),
        "device": options.device,
        "dtype": options.dtype,
        "start_timeout_seconds": START_SECONDS,
        "memory_fraction": 0.5 if options.cpu else MEMORY_FRACTION,
        "extra_args": options.engine_args,
        **keys,
    }


def has_engine(options: Options, record: Recorder, case: str) -> bool:
    """Whether SGLang can be started; if not, notes what to give."""
    if options.engine_python is not None:
        return True
    record.skip(case, "no Python interpreter with SGLang; give --engine-python")
    return False


@asynccontextmanager
async def bare_engine(section: EngineSection, model: Path, log: Path) -> AsyncIterator[StartedServer]:
    """SGLang as the rollout service starts it, without the service."""
    server = StartedServer(section, str(model), log)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def versions_of(url: str) -> dict[str, Any]:
    """What the engine says of itself."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        info = (await client.get("/server_info")).json()
    names = ("version", "device", "attention_backend", "disable_cuda_graph", "mem_fraction_static")
    return {f"engine_{name}": info.get(name) for name in names}


async def generate(
    client: httpx.AsyncClient, prompt: Sequence[int], sampling: dict[str, Any], num_completions: int, **body: Any
) -> int:
    """Completions of one prompt by SGLang itself, in one request; their tokens."""
    request = {
        "input_ids": [list(prompt)] * num_completions,
        "sampling_params": [sampling] * num_completions,
        **body,
    }
    response = await client.post("/generate", json=request)
    response.raise_for_status()
    return sum(len(answer["output_ids"]) for answer in response.json())


async def together(limit: int, calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of all calls, at most `limit` at once."""
    room = asyncio.Semaphore(limit)

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with room:
            return await call()

    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(one(call)) for call in calls]
    return [task.result() for task in started]
