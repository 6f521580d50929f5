"""Counts the bytes of tensors that live during a computation on a CPU, to the byte.

Owns the count: what exists before, by the storages that Python can reach, and what is allocated and freed during it, by
the events of PyTorch's profiler. So it holds no memory of libraries, of the interpreter or of the allocator's spares,
which the resident set has too. Memory that a computation's own threads allocate outside of autograd is not seen.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.learner_cases import GROUP_SIZE, Case, scored_groups
from benchmarks.learner_side import status_bytes
from penstock.contracts import ScoredGroup

PROMPT_LENGTH = 32
BEHAVIOUR = -5.0  # log-probability of each token; its value does not change what is computed


@dataclass(frozen=True)
class Counted:
    """held_bytes: of tensors before it; peak_bytes: of all tensors at the peak; left_bytes: more after than before."""

    held_bytes: int
    peak_bytes: int
    left_bytes: int


def held_bytes() -> int:
    """Of all tensors on the CPU that Python can reach, each storage once; of a sharded tensor this rank's shard."""
    gc.collect()
    seen: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and not issubclass(type(each), FakeTensor):  # these have no memory
            local = each._local_tensor if isinstance(each, DTensor) else each
            if local.device.type == "cpu" and local.layout == torch.strided:
                storage = local.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def counted(computation: Callable[[], object]) -> Counted:
    """Run it once and count. It should have run before: what a first run makes and keeps is no part of the peak."""
    held = held_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        computation()
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    now = most = 0
    for _, num_bytes in events:
        now += num_bytes
        most = max(most, now)
    return Counted(held, held + most, now)


def resident_growth(computation: Callable[[], object]) -> tuple[int, int]:
    """Resident bytes before it, and their peak during it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    computation()
    return before, status_bytes("VmHWM")


def groups_of(num_rows: int, num_packs: int, vocabulary: Sequence[int]) -> list[ScoredGroup]:
    """Groups that each fill a pack of at most `num_rows` rows: one prompt and completions of one length."""
    random = Random(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(random.choices(vocabulary, k=length))

    length = (num_rows - PROMPT_LENGTH) // GROUP_SIZE + 1  # the last token of each needs no row
    prompts = tuple(draw(PROMPT_LENGTH) for _ in range(num_packs))
    completions = tuple(tuple(draw(length) for _ in range(GROUP_SIZE)) for _ in range(num_packs))
    case = Case("packs", prompts, completions)
    return scored_groups(case, [[[BEHAVIOUR] * length] * GROUP_SIZE] * num_packs)
