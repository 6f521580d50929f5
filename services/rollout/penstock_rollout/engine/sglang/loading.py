"""Replaces the weights of SGLang, and reads which weights it has.

Invariant: no call that loads also flushes the cache, since SGLang ends if it cannot flush then.
"""

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.contracts.weight_sources import GroupRequest, SharedBucket, TensorSpec
from penstock.errors import EngineError
from penstock_rollout.engine.sglang.checksums import check_checksums
from penstock_rollout.engine.sglang.connection import Connection
from penstock_rollout.engine.sglang.prefetch import prefetch
from penstock_rollout.engine.sglang.tensor_pickle import pickled_tensors


class SGLangLoading:
    """`WeightLoading` of one server."""

    def __init__(self, connection: Connection) -> None:
        self.can_prefetch = False
        """Whether the server has the hook that prefetches weights during generation (`inside.prefetch`)."""
        self._connection = connection

    async def prefetch(self, folder: Path, timeout_seconds: float) -> None:
        if self.can_prefetch and self._connection.port is not None:
            await prefetch(self._connection.port, str(folder), timeout_seconds)

    async def load(self, folder: Path, weight_version: str, timeout_seconds: float) -> None:
        body = {"model_path": str(folder), "weight_version": weight_version, "flush_cache": False}
        answer = await self._connection.call("POST", "/update_weights_from_disk", body, timeout_seconds)
        if not answer.get("success"):
            raise EngineError(f"SGLang did not load {folder}: {answer.get('message')}")

    async def join_group(self, request: GroupRequest) -> None:
        body = {
            "master_address": request.address,
            "master_port": request.port,
            "rank_offset": 1,
            "world_size": request.num_ranks,
            "group_name": request.group,
            "backend": request.backend,
        }
        await self._connection.call("POST", "/init_weights_update_group", body)

    async def leave_group(self, name: str) -> None:
        await self._connection.call("POST", "/destroy_weights_update_group", {"group_name": name})

    async def begin(self) -> None:
        await self._connection.call("POST", "/begin_weight_update", {})

    async def receive(
        self, group: str, tensors: Sequence[TensorSpec], weight_version: str | None, timeout_seconds: float
    ) -> None:
        body = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
            "group_name": group,
            "load_format": "flattened_bucket",
            "weight_version": weight_version,
            "flush_cache": False,
        }
        await self._connection.call("POST", "/update_weights_from_distributed", body, timeout_seconds)

    async def load_shared(
        self, manager: str, bucket: SharedBucket, weight_version: str | None, timeout_seconds: float
    ) -> None:
        data = base64.b64encode(pickled_tensors(manager, bucket)).decode()
        body = {
            "serialized_named_tensors": [data] * self._connection.info.num_ranks,
            "weight_version": weight_version,
            "flush_cache": False,
        }
        await self._connection.call("POST", "/update_weights_from_tensor", body, timeout_seconds)

    async def end(self, timeout_seconds: float) -> None:
        await self._connection.call("POST", "/end_weight_update", {}, timeout_seconds)

    async def weight_version(self) -> str:
        return str((await self._connection.call("GET", "/model_info"))["weight_version"])

    async def compare(self, folder: Path, timeout_seconds: float) -> None:
        """See `WeightLoading`. Compares on a CPU only: on a GPU, SGLang's checksum is another hash."""
        if self._connection.info.device == "cpu":
            reported = await self.checksums(timeout_seconds)
            await asyncio.to_thread(check_checksums, folder, reported)

    async def checksums(self, timeout_seconds: float) -> dict[str, str]:
        """Checksum by the engine's name of each tensor; empty if the engine has several ranks."""
        answer = await self._connection.call("POST", "/weights_checker", {"action": "checksum"}, timeout_seconds)
        ranks: list[dict[str, Any]] = answer.get("ranks") or []
        return dict(ranks[0]["checksums"]) if len(ranks) == 1 else {}
