"""The process group of a trainer with several ranks, and their messages to each other.

Owns joining, leaving and three groups: one for tensors (nccl between GPUs, gloo between CPUs), one for the commands of
rank 0, for which the others may wait for hours, and one for checkpoints, which are written while the first computes.
Invariant: a wait ends only with its message or with an error; gloo detects the end of a rank by its closed connection.
Nothing is pickled.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from penstock.errors import ConfigError, RanksError
from penstock_trainer.distributed.rank import RankInfo

JOIN_TIMEOUT = timedelta(minutes=5)  # the slowest rank imports torch from a cold disk
NO_TIMEOUT = timedelta(days=365)  # rollouts of one batch may take hours; a dead rank is detected by its connection
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo has no type for it


class Ranks:
    """This process as one of several ranks."""

    def __init__(self, info: RankInfo, wanted: str = "auto", *, join_timeout: timedelta = JOIN_TIMEOUT) -> None:
        """Meet the other ranks; RanksError if they do not all join within the timeout. `wanted`: trainer.device."""
        self.info = info
        self.device = rank_device(wanted, info)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                timeout=join_timeout,
                rank=info.rank,
                world_size=info.num_ranks,
            )
            self._control = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
            self.checkpoints = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RanksError(
                f"rank {info.rank} has not joined the other {info.num_ranks - 1} within "
                f"{join_timeout.total_seconds():g} s ({reason}); expected all of them at "
                "MASTER_ADDR:MASTER_PORT; look for the first error of another rank, and check that hosts reach each "
                "other"
            ) from error
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, (info.num_ranks,))
        self.host_mesh: DeviceMesh = init_device_mesh("cpu", (info.num_ranks,))

    def broadcast(self, data: bytearray | None = None) -> memoryview:
        """Rank 0's `data`, on every rank; the others wait for it as long as rank 0 lives. It is copied nowhere."""
        data = bytearray() if data is None else data
        size = torch.tensor([len(data)])
        try:
            dist.broadcast(size, src=0, group=self._control)
            payload = torch.empty(int(size) if self.info.is_follower else 0, dtype=torch.uint8)
            if data:
                payload = torch.frombuffer(data, dtype=torch.uint8)
            if payload.numel():
                dist.broadcast(payload, src=0, group=self._control)
        except RuntimeError as error:
            raise self._lost(error) from error
        return payload.numpy().data

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's `data` in the order of ranks, on every rank."""
        num_ranks = self.info.num_ranks
        size = torch.tensor([len(data)])
        sizes = [torch.empty_like(size) for _ in range(num_ranks)]
        try:
            dist.all_gather(sizes, size, group=self._control)
            longest = max(int(each) for each in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = _to_tensor(data)
            parts = [torch.empty_like(padded) for _ in range(num_ranks)]
            if longest:
                dist.all_gather(parts, padded, group=self._control)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [_to_bytes(part[: int(each)]) for part, each in zip(parts, sizes, strict=True)]

    def collect(self, data: bytes) -> list[bytes]:
        """Every rank's `data` in the order of ranks, on rank 0; the others send theirs and get nothing."""
        size = torch.tensor([len(data)])
        sizes = [torch.empty_like(size) for _ in range(self.info.num_ranks)]
        try:
            dist.all_gather(sizes, size, group=self._control)
            longest = max(int(each) for each in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = _to_tensor(data)
            parts = None if self.info.is_follower else [torch.empty_like(padded) for _ in sizes]
            if longest:
                dist.gather(padded, parts, dst=0, group=self._control)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [_to_bytes(part[: int(each)]) for part, each in zip(parts or [], sizes, strict=parts is not None)]

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around a computation of all ranks: RanksError if it fails because another rank has ended."""
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error) for words in LOST_RANK):
                raise
            raise self._lost(error) from error

    def leave(self) -> None:
        """End in order, together with all ranks."""
        dist.destroy_process_group()

    def _lost(self, error: RuntimeError) -> RanksError:
        reason = " ".join(str(error).split())[:200]
        others = "rank 0" if self.info.is_follower and self.info.num_ranks == 2 else "another rank"
        return RanksError(
            f"rank {self.info.rank} has lost {others} ({reason}); expected all {self.info.num_ranks} to live; look "
            "for the first error in this log"
        )


def rank_device(wanted: str, info: RankInfo | None = None) -> torch.device:
    """The device of a rank, or of the only one; ConfigError if it has no GPU. `wanted`: trainer.device."""
    info = info or RankInfo()
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise ConfigError(
            f"trainer.device is cuda, and torch {torch.__version__}, which {build}, sees no GPU: expected a GPU that "
            "`nvidia-smi` shows and CUDA_VISIBLE_DEVICES leaves visible, and a torch for CUDA; or trainer.device cpu"
        )
    if info.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {info.rank} is number {info.local_rank} (from 0) of its host, which has "
            f"{torch.cuda.device_count()} GPUs: expected one for each rank; lower trainer.num_ranks"
        )
    return torch.device("cuda", info.local_rank)


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _to_bytes(data: Tensor) -> bytes:
    return data.numpy().tobytes()
