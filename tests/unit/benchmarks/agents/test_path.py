"""The benchmark of episodes compares two ways to compute the same gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.agents.path import History, make_group, measure, row_packs, turn_samples
from benchmarks.counted_memory import held_bytes
from benchmarks.learner_side import relative_difference
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.packing import make_packs

MAX_TOKENS = 256


@pytest.mark.parametrize("history", ["kept", "stripped"])
def test_both_sides_of_the_benchmark_train_the_same(history: History) -> None:
    group = make_group(3, history)
    samples = make_batch([group], BatchRules(Overlong(2**20)), version=0).samples
    assert len(samples) == (2 if history == "kept" else 6)
    per_turn = turn_samples(group, samples)
    assert len(per_turn) == 6
    rows, trie = measure(row_packs(per_turn, MAX_TOKENS)), measure(make_packs(samples, MAX_TOKENS))
    assert rows.num_rows == sum(each.prompt_ids.size + each.token_ids.size - 1 for each in per_turn)
    assert rows.num_rows > 2 * trie.num_rows
    assert rows.num_passes > trie.num_passes
    assert relative_difference(trie.gradients, rows.gradients) < 1e-5


def test_tensors_without_memory_are_not_counted() -> None:
    """Other code in the process may have left some."""
    before = held_bytes()
    with FakeTensorMode():
        fake = torch.empty(1000)
    real = torch.empty(1000)
    assert held_bytes() == before + real.nbytes
    assert fake.nbytes == real.nbytes
