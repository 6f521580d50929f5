"""Experts on their way from the engine to the group that is handed over."""

import base64
import struct
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.config import EngineSection
from penstock.contracts import Completion, PolicyIdentity, RolloutGroup, Sampling, unpack_int32
from penstock.contracts.trajectories import RoutedExperts
from penstock.errors import EngineError
from penstock_rollout.engine.draft import Draft
from penstock_rollout.engine.sglang.answers import read_group
from penstock_rollout.engine.sglang.arguments import command
from penstock_rollout.engine.sglang.inside import experts, prefill
from penstock_rollout.engine.types import Answer, AnsweredSpan, CompletionRequest, completions, prompt_experts
from tests.unit.rollout.engine.test_draft import PROMPT, SEEDS, engine
from tests.unit.rollout.inside.test_prefill import Engine as PrefillEngine
from tests.unit.rollout.producer_setup import producing_rollout, ticket
from tests.unit.rollout.test_fake_engine import experts_of

ROW = 6  # two layers of three experts
MAX_TOKENS = 8


def numbers(rows: RoutedExperts) -> list[int]:
    """The inverse of the packing, by Python's own struct."""
    code, size = ("B", 1) if rows.dtype == "uint8" else ("H", 2)
    return list(struct.unpack(f"<{len(rows.data) // size}{code}", rows.data))


def body(encoded: object, num_tokens: int = 2, finish: str = "stop") -> bytes:
    meta = {
        "finish_reason": {"type": finish},
        "output_token_logprobs": [[-1.0, 4, None]] * num_tokens,
        "routed_experts": encoded,
    }
    return msgspec.json.encode([{"text": "", "output_ids": [4] * num_tokens, "meta_info": meta}])


def encode(values: list[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}i", *values)).decode()


@given(values=st.lists(st.integers(0, 400), min_size=4 * ROW, max_size=4 * ROW))
def test_sglangs_int32_is_packed_as_narrow_as_it_fits(values: list[int]) -> None:
    (answer,) = read_group(body(encode(values)), 1, [3])
    assert answer.experts is not None
    assert numbers(answer.experts) == values
    assert answer.experts.dtype == ("uint8" if max(values) < 256 else "uint16")
    assert (answer.experts.num_rows, answer.experts.row_length) == (4, ROW)


@pytest.mark.parametrize(
    ("encoded", "seen"),
    [
        (None, "without routed experts.*--enable-return-routed-experts.*actor.router_replay"),
        ("?", "cannot be read"),
        (encode([1] * (4 * ROW + 1)), "100 bytes for 4 tokens"),
        (encode([1] * (4 * ROW - 1) + [-1]), "below 0"),
        (encode([1] * (4 * ROW - 1) + [70000]), "above 65535"),
        ("", "without routed experts"),
    ],
)
def test_experts_that_cannot_be_right_are_no_completion(encoded: object, seen: str) -> None:
    with pytest.raises(EngineError, match=seen):
        read_group(body(encoded), 1, [3])


def test_who_does_not_ask_gets_none() -> None:
    (answer,) = read_group(body(encode([1] * 24)), 1)
    assert answer.experts is None
    (cut,) = read_group(body(None, finish="abort"), 1, [3])
    assert cut.experts is None  # of the request that continues it


def answered(request: CompletionRequest, limit: int, *, lost: bool) -> Answer:
    """`lost`: if it is cut, it comes without experts."""
    answer = engine(request, "v", limit)
    tokens = [*request.prompt_ids, *answer.token_ids]
    if lost and answer.finish_reason == "abort":
        return answer
    data = bytes(each % 256 for each in experts_of(tokens[:-1]))
    return replace(answer, experts=RoutedExperts(ROW, "uint8", data))


@given(cuts=st.lists(st.tuples(st.integers(0, MAX_TOKENS), st.booleans()), max_size=4))
def test_a_completion_that_was_cut_has_the_experts_of_all_its_tokens(cuts: list[tuple[int, bool]]) -> None:
    """Each piece's own, and those of a piece that came without them by the next one."""
    draft = Draft(PROMPT, SEEDS[:1], Sampling(1.0, MAX_TOKENS, ()), one_version_per_answer=True, with_experts=True)
    for limit, lost in [*cuts, (MAX_TOKENS + 1, False)]:
        if draft.finished:
            break
        (request,) = draft.requests()
        assert request.with_experts
        draft.add((answered(request, limit, lost=lost),))
    (whole,) = draft.group()
    known = {"v": PolicyIdentity(0, "0" * 16)}
    (made,) = completions((whole,), known, len(PROMPT))
    first = prompt_experts((whole,), len(PROMPT))
    assert isinstance(made, Completion)
    assert made.experts is not None
    assert first is not None
    tokens = unpack_int32(made.token_ids)
    assert numbers(first) == [each % 256 for each in experts_of(PROMPT)]
    assert numbers(made.experts) == [each % 256 for each in experts_of(tokens[:-1])]


def test_narrow_and_wide_rows_join() -> None:
    narrow = RoutedExperts(2, "uint8", bytes([1, 2, 3, 4]))
    wide = RoutedExperts(2, "uint16", struct.pack("<6H", 9, 9, 9, 9, 5, 300))
    assert numbers(narrow.extended_by(wide)) == [1, 2, 3, 4, 5, 300]
    assert numbers(wide.extended_by(RoutedExperts(2, "uint8", bytes(range(8))))) == [9, 9, 9, 9, 5, 300, 6, 7]
    with pytest.raises(ValueError, match="rows of 3 experts after rows of 2"):
        narrow.extended_by(RoutedExperts(3, "uint8", bytes(3)))


def test_experts_of_too_few_tokens_are_no_completion() -> None:
    answer = Answer(
        array("i", [1, 2]),
        array("f", [-1, -1]),
        (AnsweredSpan("v", 0, 2),),
        "",
        "stop",
        experts=RoutedExperts(1, "uint8", bytes(3)),
    )
    with pytest.raises(EngineError, match="experts do not fit its 2 tokens"):
        completions((answer,), {"v": PolicyIdentity(0, "0" * 16)}, 3)


@pytest.mark.parametrize("replays", [True, False])
async def test_a_group_has_the_experts_of_its_tokens_if_they_are_replayed(replays: bool, tmp_path: Path) -> None:
    """Of training alone: an evaluation is not trained."""
    actor = {"path": "unused", "group_size": 2, "router_replay": replays}
    async with producing_rollout(tmp_path, actor=actor) as rollout:
        rollout.queue.put(ticket(0))
        rollout.queue.put(ticket(1, "eval"))
        rollout.announce(1)
        await rollout.until(lambda: len(rollout.queue.published) == 2)
        groups = {each.ticket.purpose: each for each in rollout.queue.published}
        assert _experts(groups["eval"]) == [None, None, None]
        if not replays:
            assert _experts(groups["train"]) == [None, None, None]
            assert not any(each and "return_routed_experts" in each for _, each in rollout.fake.calls)
            return
        prompt, *answers = _experts(groups["train"])
        assert prompt is not None
        assert numbers(prompt) == experts_of([1, 2])
        for each, found in zip(groups["train"].completions, answers, strict=True):
            assert found is not None
            assert numbers(found) == experts_of(unpack_int32(each.token_ids)[:-1])


def _experts(group: RolloutGroup) -> list[RoutedExperts | None]:
    return [group.prompt_experts, *(each.experts for each in group.completions)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_engine_is_started_so_that_it_can_return_them(device: str) -> None:
    for returns in (True, False):
        arguments = command(EngineSection(), "python", device, "model", 1, returns_experts=returns)
        assert ("--enable-return-routed-experts" in arguments) is returns


def test_equal_prompts_are_computed_one_by_one_while_experts_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang reads the experts of each row of the batch, also of those that would be left out."""
    capturer = SimpleNamespace(get_global_experts_capturer=object)
    monkeypatch.setitem(sys.modules, "sglang.srt.state_capturer.routed_experts", capturer)
    seen = []
    prefill.execute(lambda runner, batch: seen.append(batch), PrefillEngine(), "the batch")
    assert seen == ["the batch"]


def test_memory_for_experts_is_plain_on_a_cpu() -> None:
    class Allocator:
        def allocate(self, dims: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
            return torch.empty(dims, dtype=dtype, device=device)

    def registers(*_: Any, **__: Any) -> Any:
        raise AssertionError("there is no GPU to register memory with")

    (hook,) = experts.hooks().values()
    options: dict[str, Any] = {"dtype": torch.int32, "device": "cpu", "pin_memory": True, "allocator": Allocator()}
    assert hook(registers, (3, 2), **options).shape == (3, 2)
