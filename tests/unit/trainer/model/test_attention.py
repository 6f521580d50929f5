"""Trie attention equals the dense mask; its plan has every pair once, at the cost of the ancestors alone."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaModel

from penstock.errors import ConfigError
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.packing import Pack, make_packs
from penstock_trainer.model import attention
from penstock_trainer.model.attention import TrieAttention, trie_attention, trie_mask
from penstock_trainer.model.attention_plan import Piece, plan_pieces
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from penstock_trainer.weights.hugging_face import config_json
from tests.unit.trainer.trainer_groups import example_groups, save_tiny_model, tiny_model

QUERY_HEADS, KEY_HEADS, HEAD_SIZE = 6, 2, 16


def forest(depths: list[int]) -> list[int]:
    """subtree_end of a trie whose rows, in preorder, have these depths; a depth without a parent becomes smaller."""
    path: list[int] = []
    ends = [0] * len(depths)
    for row, depth in enumerate(depths):
        for done in path[depth:]:
            ends[done] = row
        path = [*path[:depth], row]
    for row in path:
        ends[row] = len(depths)
    return ends


def chains(prompt_rows: int, completion_rows: list[int]) -> list[int]:
    """One prompt and its completions, which share only the prompt."""
    ends = [prompt_rows + sum(completion_rows)] * prompt_rows
    for rows in completion_rows:
        ends += [len(ends) + rows] * rows
    return ends


class Layer(nn.Module):
    num_key_value_groups = QUERY_HEADS // KEY_HEADS
    is_causal = True


def inputs(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    query, key, value = (
        torch.randn(1, num_rows, heads, HEAD_SIZE, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    )
    return query, key, value


def run(subtree_end: list[int], trie: TrieAttention | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients; with the dense mask if there is no trie."""
    tensors = inputs(len(subtree_end), dtype)
    mask = None if trie else trie_mask(torch.tensor(subtree_end), dtype)
    output, _ = trie_attention(Layer(), *tensors, mask, scaling=0.3, trie=trie)
    return [output, *torch.autograd.grad(output.float().sin().sum(), tensors)]


@pytest.mark.parametrize("call_scores", [0, 500, 10**9])
@settings(deadline=None, max_examples=40)
@given(depths=st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_random_tries_equal_the_dense_mask(call_scores: int, depths: list[int]) -> None:
    ends = forest(depths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock_trainer.model.attention_plan.CALL_SCORES", call_scores)
        ours = run(ends, TrieAttention.of(torch.tensor(ends)))
    torch.testing.assert_close(ours, run(ends, None), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "ends", [[1], [700] * 700, chains(90, [200, 3, 150, 1]), [*chains(40, [100] * 4), 442, 442, 443]]
)
def test_long_tries_equal_the_dense_mask(ends: list[int]) -> None:
    torch.testing.assert_close(run(ends, TrieAttention.of(torch.tensor(ends))), run(ends, None), rtol=1e-4, atol=2e-5)


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    ends = chains(90, [200, 3, 150])
    ours = run(ends, TrieAttention.of(torch.tensor(ends)), torch.bfloat16)
    assert all(each.dtype == torch.bfloat16 for each in ours)
    for seen, exact in zip(ours, run(ends, None), strict=True):
        assert (seen.float() - exact).norm() < 0.02 * exact.norm()


def test_values_of_another_size_than_keys() -> None:
    ends = chains(90, [200, 150])
    query, key, value = inputs(len(ends))
    trie = TrieAttention.of(torch.tensor(ends))
    narrow, _ = trie_attention(Layer(), query, key, value[..., :5], None, trie=trie)
    torch.testing.assert_close(narrow, trie_attention(Layer(), query, key, value, None, trie=trie)[0][..., :5])


@settings(deadline=None, max_examples=60)
@given(depths=st.lists(st.integers(0, 12), min_size=1, max_size=40), call_scores=st.sampled_from([0, 5, 50, 500]))
def test_plan_holds_every_pair_once(depths: list[int], call_scores: int) -> None:
    ends = forest(depths)
    mask = trie_mask(torch.tensor(ends), torch.float32)[0, 0] == 0
    seen = torch.zeros(len(ends), len(ends), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock_trainer.model.attention_plan.CALL_SCORES", call_scores)
        pieces = plan_pieces(ends)
    for piece in pieces:
        area = (slice(piece.query_start, piece.query_stop), slice(piece.key_start, piece.key_stop))
        ones = torch.ones_like(seen[area])
        seen[area] += {"full": ones, "causal": ones.tril(), "masked": mask[area].long()}[piece.kind]
    assert torch.equal(seen, mask.long())
    kinds = [piece.kind == "full" for piece in pieces]
    assert kinds == sorted(kinds)  # a row's own piece comes before those that are merged into it


def test_plan_suits_the_shape_of_the_trie() -> None:
    assert [piece.kind for piece in plan_pieces([4096] * 4096)] == ["causal"]
    assert [piece.kind for piece in plan_pieces(chains(3, [2, 1, 2, 2]))] == ["masked"]
    ends = [base + end for base in range(0, 32000, 1000) for end in chains(100, [100] * 9)]
    pieces = plan_pieces(ends)
    scores = sum((each.query_stop - each.query_start) * (each.key_stop - each.key_start) for each in pieces)
    assert scores < 0.01 * len(ends) ** 2
    assert "masked" not in {piece.kind for piece in pieces}


def test_flex_attention_sees_the_same() -> None:
    ends = [*chains(70, [100, 3, 90]), 265, 265]
    trie = TrieAttention(blocks=attention._block_mask(torch.tensor(ends)))
    with torch.no_grad():
        query, key, value = (each.detach() for each in inputs(len(ends)))
        # Uncompiled, as here, it computes the dense product and warns.
        with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
            output, _ = trie_attention(Layer(), query, key, value, None, scaling=0.3, trie=trie)
    torch.testing.assert_close(output, run(ends, None)[0], rtol=1e-4, atol=2e-6)


@pytest.fixture
def compiling_for_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is compiled for a GPU is compiled here, too: traced in full, and run as it was traced."""
    forget_compiled()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    forget_compiled()


def forget_compiled() -> None:
    attention._compiled_attention.cache_clear()
    attention._compiled_mask.cache_clear()
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling_for_cpus")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_the_compiled_form_stays_compiled_for_many_models_and_lengths() -> None:
    """Past torch's limit of graphs it would compute dense scores, which a long pack has no memory for."""
    counters["stats"].clear()
    attend = attention._compiled_attention()
    with torch.no_grad():
        for head_size in (16, 24, 32, 40, 48):
            for ends in (chains(70, [100, 3]), chains(90, [7, 100]), [100] * 100):
                blocks = attention._block_mask(torch.tensor(ends))
                query, key, value = (torch.randn(1, QUERY_HEADS, len(ends), head_size) for _ in range(3))
                output = attend(query, key, value, block_mask=blocks, scale=0.3)
                mask = trie_mask(torch.tensor(ends), torch.float32)
                expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-6)
    assert counters["stats"]["unique_graphs"] > 8


@pytest.mark.usefixtures("compiling_for_cpus")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_compiled_mask_is_the_same() -> None:
    ends = torch.tensor(chains(70, [100, 3]))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    compiled = attention._compiled_mask()(sees, None, None, len(ends), len(ends), device=ends.device)
    assert torch.equal(compiled.to_dense(), attention._block_mask(ends).to_dense())


def example_pack() -> Pack:
    (pack,) = make_packs(make_batch(example_groups(), BatchRules(Overlong(8)), version=0).samples, 4096)
    return pack


def test_plan_is_made_once_per_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def plan(subtree_end: list[int]) -> list[Piece]:
        calls.append(len(subtree_end))
        return plan_pieces(subtree_end)

    monkeypatch.setattr(attention, "plan_pieces", plan)
    pack = example_pack()
    model = PackModel(tiny_model(), dtype=torch.float32, temperature=1.0, gradient_checkpointing=True)
    model.token_logprobs(pack)[0].sum().backward()
    assert calls == [pack.num_rows]


def test_model_without_attention_interface_gets_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = example_pack()
    expected = PackModel(tiny_model(), dtype=torch.float32, temperature=1.0).token_logprobs(pack)
    model = tiny_model()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
    monkeypatch.setattr(attention, "plan_pieces", None)
    torch.testing.assert_close(
        PackModel(model, dtype=torch.float32, temperature=1.0).token_logprobs(pack), expected, rtol=1e-4, atol=1e-5
    )


def test_plain_call_still_honours_padding() -> None:
    model = tiny_model().eval()
    ids, padding = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    expected = model(input_ids=ids, attention_mask=padding).logits[:, 2:]
    PackModel(model, dtype=torch.float32, temperature=1.0)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=padding).logits[:, 2:], expected)


def test_published_config_does_not_name_the_attention() -> None:
    model = tiny_model()
    PackModel(model, dtype=torch.float32, temperature=1.0)
    assert attention.NAME not in config_json(model, "float32").decode()


def test_model_that_drops_the_trie_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    forward = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, *args, trie=None, **rest: forward(self, *args, **rest))
    with pytest.raises(ConfigError, match="expected a causal model that mixes tokens by attention only"):
        load_model(str(tmp_path), "actor.path")
