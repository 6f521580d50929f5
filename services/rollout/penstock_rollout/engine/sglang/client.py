"""Implements `EngineClient` for SGLang: one connection, shared by generation, loading and memory."""

from penstock.config import EngineSection
from penstock_rollout.engine.sglang.connection import Connection
from penstock_rollout.engine.sglang.generation import SGLangGeneration
from penstock_rollout.engine.sglang.loading import SGLangLoading
from penstock_rollout.engine.sglang.memory import SGLangMemory
from penstock_rollout.engine.types import EngineInfo


class SGLangClient:
    """One SGLang server."""

    def __init__(self, section: EngineSection, *, returns_experts: bool = False) -> None:
        """`returns_experts`: the server was started so that it can return the experts of tokens."""
        self.connection = Connection()
        self.generation = SGLangGeneration(
            self.connection, section.request_timeout_seconds, skip_special_tokens=section.skip_special_tokens
        )
        self.loading = SGLangLoading(self.connection)
        self.memory = SGLangMemory(self.connection)
        self._is_ours = not section.url
        self._returns_experts = returns_experts

    @property
    def info(self) -> EngineInfo:
        return self.connection.info

    async def connect(self, url: str) -> EngineInfo:
        await self.close()
        info = await self.connection.open(url)
        has_hooks = self._is_ours and info.device == "cpu"  # see `inside.launcher`
        self.loading.can_prefetch = has_hooks
        self.generation.start(info.weight_version, computes_equal_once=has_hooks and not self._returns_experts)
        return info

    async def close(self) -> None:
        async with self.connection.closing():
            await self.generation.close()
