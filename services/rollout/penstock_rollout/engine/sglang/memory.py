"""Lets SGLang give up its GPU memory, and take it again.

Invariant: what is taken again is what was given up, once each. SGLang ends if it is asked to give up memory while a
request runs, or to take memory that it has.
"""

from penstock_rollout.engine.sglang.connection import Connection

WEIGHTS, CACHE, GRAPHS = "weights", "kv_cache", "cuda_graph"  # SGLang's tags: docs/adr/0010


class SGLangMemory:
    """`GpuMemory` of one server, which `arguments.command` starts with a saver of memory if it has a GPU."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def give_up(self, timeout_seconds: float) -> None:
        await self._call("release", [CACHE, WEIGHTS, GRAPHS], timeout_seconds)

    async def take_weights(self, timeout_seconds: float) -> None:
        await self._call("resume", [WEIGHTS], timeout_seconds)

    async def take_cache(self, timeout_seconds: float) -> None:
        await self._call("resume", [CACHE, GRAPHS], timeout_seconds)

    async def _call(self, action: str, tags: list[str], timeout_seconds: float) -> None:
        await self._connection.call("POST", f"/{action}_memory_occupation", {"tags": tags}, timeout_seconds)
