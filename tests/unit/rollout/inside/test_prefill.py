"""Prefill that computes equal sequences once, against computing each."""

import dataclasses
from typing import Any

import pytest
import torch

from penstock_rollout.engine.sglang.inside import prefill

LAYERS, SLOTS, VOCABULARY = 3, 300, 11


class Mode:
    """The mode of a forward pass, and of what it captures."""

    def __init__(self, name: str) -> None:
        self._name = name

    def is_extend(self) -> bool:
        return self._name in ("extend", "mixed")

    def is_mixed(self) -> bool:
        return self._name == "mixed"

    def need_capture(self) -> bool:
        return self._name == "capture"


@dataclasses.dataclass
class Batch:
    """The fields of SGLang's ForwardBatch that a plain prefill has."""

    input_ids: Any
    req_pool_indices: Any
    seq_lens: Any
    out_cache_loc: Any
    positions: Any
    extend_prefix_lens_cpu: list[int]
    extend_seq_lens_cpu: list[int]
    extend_logprob_start_lens_cpu: list[int]
    extend_start_loc: Any
    rids: list[str]
    sampling_info: list[str]
    batch_size: int
    seq_lens_sum: int
    extend_num_tokens: int
    forward_mode: Mode = dataclasses.field(default_factory=lambda: Mode("extend"))
    capture_hidden_mode: Mode = dataclasses.field(default_factory=lambda: Mode("none"))
    spec_info: Any = None
    return_logprob: bool = True
    extend_input_logprob_token_ids_gpu: Any = dataclasses.field(default_factory=lambda: torch.empty(0))
    temperature: Any = dataclasses.field(default_factory=lambda: torch.tensor(1.0))
    unknown: Any = None


class Engine:
    """A cache, and a model whose keys, values and logits depend on all earlier tokens of a sequence."""

    def __init__(self) -> None:
        self.token_to_kv_pool = self
        self.k_buffer = [torch.zeros(SLOTS, 2) for _ in range(LAYERS)]
        self.v_buffer = [torch.zeros(SLOTS, 2) for _ in range(LAYERS)]
        self.req_to_token_pool = self
        self.req_to_token = torch.zeros(20, 40, dtype=torch.int32)
        self.model_runner = self
        self.computed = 0

    def forward(self, _: "Engine", batch: Batch) -> Any:
        self.computed = len(batch.input_ids)
        assert batch.extend_num_tokens == len(batch.input_ids) == len(batch.out_cache_loc) == len(batch.positions)
        assert batch.batch_size == len(batch.rids) == len(batch.seq_lens)
        assert batch.seq_lens_sum == int(batch.seq_lens.sum())
        last = []
        for row in range(batch.batch_size):
            start, length = int(batch.extend_start_loc[row]), batch.extend_seq_lens_cpu[row]
            cached = self.req_to_token[batch.req_pool_indices[row], : batch.extend_prefix_lens_cpu[row]].long()
            slots = torch.cat([cached, batch.out_cache_loc[start : start + length]])
            for token in range(start, start + length):
                slot, position = batch.out_cache_loc[token], int(batch.positions[token])
                for layer in range(LAYERS):
                    before = self.k_buffer[layer][slots[:position]].sum()
                    self.k_buffer[layer][slot] = before * 0.5 + batch.input_ids[token] + layer
                    self.v_buffer[layer][slot] = before - batch.input_ids[token]
            last.append(self.v_buffer[-1][slots].sum() * torch.arange(VOCABULARY))
        return type("Output", (), {"next_token_logits": torch.stack(last)})()


def batch_of(engine: Engine, sequences: list[tuple[list[int], list[int]]]) -> Batch:
    """A batch of (cached tokens, new tokens); equal cached tokens share their slots."""
    shared: dict[tuple[int, ...], Any] = {}
    free = 0
    new_slots: list[int] = []
    for row, (cached, new) in enumerate(sequences):
        if tuple(cached) not in shared:
            slots = shared[tuple(cached)] = torch.arange(free, free + len(cached), dtype=torch.int32)
            free += len(cached)
            for layer in range(LAYERS):
                engine.k_buffer[layer][slots.long()] = torch.tensor(cached, dtype=torch.float32)[:, None]
                engine.v_buffer[layer][slots.long()] = torch.tensor(cached, dtype=torch.float32)[:, None]
        engine.req_to_token[row, : len(cached)] = shared[tuple(cached)]
        new_slots += range(100 + len(new_slots), 100 + len(new_slots) + len(new))
    lengths = [len(new) for _, new in sequences]
    prefixes = [len(cached) for cached, _ in sequences]
    return Batch(
        input_ids=torch.tensor([token for _, new in sequences for token in new]),
        req_pool_indices=torch.arange(len(sequences)),
        seq_lens=torch.tensor(lengths) + torch.tensor(prefixes),
        out_cache_loc=torch.tensor(new_slots),
        positions=torch.tensor([len(cached) + i for cached, new in sequences for i in range(len(new))]),
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens_cpu=lengths,
        extend_logprob_start_lens_cpu=lengths,
        extend_start_loc=torch.tensor(lengths).cumsum(0) - torch.tensor(lengths),
        rids=[str(row) for row in range(len(sequences))],
        sampling_info=["of", "all"],
        batch_size=len(sequences),
        seq_lens_sum=sum(lengths) + sum(prefixes),
        extend_num_tokens=sum(lengths),
    )


SEQUENCES = [
    ([1, 2, 3], [4]), ([1, 2, 3], [4]), ([1, 2, 3], [5]), ([7, 8], [4]), ([1, 2, 3], [4]), ([7, 8], [4]),
]  # fmt: skip
RAGGED = [([1, 2], [3, 4, 5]), ([], [9]), ([1, 2], [3, 4, 5]), ([1, 2], [3, 4]), ([], [9]), ([6], [9])]


@pytest.mark.parametrize(("sequences", "num_computed"), [(SEQUENCES, 3), (RAGGED, 7), (RAGGED[2:4], 5)])
def test_equal_sequences_get_what_each_alone_would_get(
    sequences: list[tuple[list[int], list[int]]], num_computed: int
) -> None:
    plain, hooked = Engine(), Engine()
    expected = plain.forward(plain, batch_of(plain, sequences))
    output = prefill.execute(hooked.forward, hooked, batch_of(hooked, sequences))
    assert hooked.computed == num_computed
    assert torch.equal(output.next_token_logits, expected.next_token_logits)
    for one, other in zip(plain.k_buffer + plain.v_buffer, hooked.k_buffer + hooked.v_buffer, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"forward_mode": Mode("decode")},
        {"forward_mode": Mode("mixed")},
        {"capture_hidden_mode": Mode("capture")},
        {"spec_info": object()},
        {"extend_logprob_start_lens_cpu": [0] * len(SEQUENCES)},
        {"unknown": torch.zeros(len(SEQUENCES) + 1)},
        {"unknown": ["a"]},
    ],
)
def test_any_other_batch_is_left_alone(changes: dict[str, Any]) -> None:
    engine = Engine()
    batch = dataclasses.replace(batch_of(engine, SEQUENCES), **changes)
    seen: list[Any] = []
    prefill.execute(lambda _, given: seen.append(given), engine, batch)
    assert seen == [batch]
    assert seen[0] is batch
