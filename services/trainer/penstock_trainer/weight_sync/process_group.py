"""Process groups of the trainer with one engine each, outside the trainer's own ranks.

Owns the store at which engines meet rank 0, and the groups. Each engine has its own group, so a dead engine blocks no
other. Invariants: every collective has a deadline; after a failed collective its group is never used again. SGLang
makes the other end with `init_custom_process_group`; this module uses the same names of keys in the store. It makes the
store itself, because torch's rendezvous, under torchrun, would take torchrun's store and never answer. Nothing touches
torch's default group.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed does not export them

from penstock.errors import ConfigError

Backend = Literal["nccl", "gloo"]
T = TypeVar("T")
DEVICE_OF = {"gloo": "cpu", "nccl": "cuda"}  # the name under which torch registers a backend first
LONGEST = timedelta(minutes=5)  # of one read of the store; every wait has a deadline of its own


class MeetingPoint:
    """A store on this host that the engines of all groups connect to."""

    def __init__(self, host: str, port: int) -> None:
        """ConfigError if the port is taken; 0: a free port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"weights.rendezvous_port: {host}:{port} cannot be listened on ({error.strerror}); expected a free "
                "port, or 0"
            ) from error
        listener.listen(128)
        self.address = host
        self.port = int(listener.getsockname()[1])
        self.store = TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=LONGEST,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class Group:
    """Rank 0 of one group."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._device = device

    @classmethod
    def meet(
        cls, store: Store, name: str, num_ranks: int, backend: Backend, device: torch.device, seconds: float
    ) -> "Group":
        """Return when all ranks have joined; RuntimeError if they do not in time. Blocks its thread."""
        prefixed = PrefixStore(f"{DEVICE_OF[backend]}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=seconds)
            return cls(dist.ProcessGroupNCCL(prefixed, 0, num_ranks, options), device)
        return cls(dist.ProcessGroupGloo(prefixed, 0, num_ranks, timedelta(seconds=seconds)), torch.device("cpu"))

    def broadcast(self, data: Tensor, seconds: float) -> None:
        """Send to all ranks; RuntimeError if a peer is gone or does not receive in time. Blocks its thread."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = timedelta(seconds=seconds)
        if self._device.type == "cpu":
            self._group.broadcast([data], options).wait()
            return
        torch.cuda.set_device(self._device)  # of this thread
        self._group.broadcast([data.to(self._device, non_blocking=True)], options).wait()
        torch.cuda.current_stream().synchronize()  # `abort` ends it

    def abort(self) -> None:
        """Abort the group. Its waits end: with nccl at once, with gloo when the peer ends or the deadline passes."""
        self._group.abort()


def in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run in a daemon thread: it may hang in a collective, and must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def resolve(result: T | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as seen:
            error = seen
        if not loop.is_closed():
            loop.call_soon_threadsafe(resolve, result, error)

    threading.Thread(target=run, daemon=True, name="collective").start()
    return future
