"""Lets SGLang record the experts of tokens on a CPU.

SGLang keeps them in host memory that it registers with CUDA, for copies from a GPU. Without a GPU there is nothing to
register, and SGLang would end at its start: here such memory is plain.

Runs inside SGLang's scheduler; `launcher` registers it in SGLang's hook registry.
"""

from collections.abc import Callable
from typing import Any

Hook = Callable[..., Any]


def hooks() -> dict[str, Hook]:
    """The hooks around SGLang's functions, by their full names."""
    return {"sglang.srt.mem_cache.pool_host.common.alloc_with_host_register": allocate}


def allocate(
    _: Hook, dims: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any, *__: Any, **___: Any
) -> Any:
    """Host memory for a device that is the host."""
    return allocator.allocate(dims, dtype=dtype, device=device)
