"""Process groups of the trainer with one engine each, outside the trainer's own ranks.

Owns the store at which engines meet rank 0, and the groups. A group per engine, so that a dead one blocks nobody else.
Invariants: every collective has a deadline; a group in which one failed is never used again. SGLang makes the other end
with `init_custom_process_group`, whose names of keys in the store are repeated here. The store is made by hand, because
torch's rendezvous, under torchrun, would take torchrun's store and never answer. Nothing touches torch's default group.
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
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed hides that it has them

from penstock.errors import ConfigError

Backend = Literal["nccl", "gloo"]
T = TypeVar("T")
DEVICE_OF = {"gloo": "cpu", "nccl": "cuda"}  # the name under which torch registers a backend first
LONGEST = timedelta(minutes=5)  # of a look into the store; nobody waits there without a deadline of his own


class MeetingPoint:
    """A store on this host that the engines of all groups connect to."""

    def __init__(self, host: str, port: int) -> None:
        """ConfigError when the port is taken; 0: a free one."""
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
        """Return when all have come; RuntimeError when they have not in time. Blocks its thread."""
        prefixed = PrefixStore(f"{DEVICE_OF[backend]}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=seconds)
            return cls(dist.ProcessGroupNCCL(prefixed, 0, num_ranks, options), device)
        return cls(dist.ProcessGroupGloo(prefixed, 0, num_ranks, timedelta(seconds=seconds)), torch.device("cpu"))

    def broadcast(self, data: Tensor, seconds: float) -> None:
        """Send to all; RuntimeError when a peer is gone or does not take it in time. Blocks its thread."""
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
        """Give the group up. What waits in it ends: with nccl at once, with gloo when its peer goes or it is late."""
        self._group.abort()


def in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run in a thread that the end of the process does not wait for, as it may hang in a collective."""
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
