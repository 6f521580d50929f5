"""The table of docs/agents-families.md is true: one test per row, with a tokenizer that has the family's tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.config.agent import AgentSection
from penstock.contracts.trajectories import PolicyIdentity, VersionSpan
from penstock.contracts.wire import pack_float32, pack_int32, unpack_int32
from penstock.errors import CallRefusedError
from penstock_agent.capture.chat_template import ChatTemplate
from penstock_agent.capture.families import PROBES, Family, detect, family_names
from penstock_agent.capture.make import rendering_of
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.tree import EpisodeTree
from tests.unit.agent.capture.tokenizers import family_tokenizer, speaks

TABLE = Path(__file__).parents[4] / "docs/agents-families.md"
NO_TOKENIZER = {"gpt-oss"}  # made only with a vocabulary that is downloaded
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
USER: Message = {"role": "user", "content": "Well?"}
ANSWER: Message = {"role": "assistant", "content": "Yes."}


def calls(count: int, thinking: str = "") -> tuple[Message, list[Message]]:
    """A turn of the model, and the results of its calls."""
    ids = [f"functions.look:{each}" for each in range(count)]  # the form of Kimi's, which others take as well
    turn: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": each, "type": "function", "function": {"name": "look", "arguments": f'{{"at": "x{each[-1]}"}}'}}
            for each in ids
        ],
    }
    results = [{"role": "tool", "tool_call_id": each, "name": "look", "content": f"saw {each[-1]}"} for each in ids]
    return (turn | {"reasoning_content": thinking} if thinking else turn), results


def rendering_for(name: str, **section: Any) -> Any:
    return rendering_of(AgentSection(environment="a:B", tool_format=name, **section), family_tokenizer(name))


def sampled(
    rendering: Any, turn: Message, new: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[int], list[int]]:
    """The prompt and the turn as the family writes them in a whole conversation."""
    prompt, whole = rendering.render([USER], tools), rendering.render([USER, turn, *new], tools)
    start = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt))
    rest = whole[start:]
    end = next(at for at, token in enumerate(rest) if token in rendering.stop_token_ids)
    return whole[:start], rest[: end + 1]


def reads(rendering: Any, turn: Message, new: Sequence[Message], tools: Sequence[Tool]) -> Message | None:
    try:
        prompt, tokens = sampled(rendering, turn, new, tools)
    except CallRefusedError:
        return None
    parsed = rendering.parse(prompt, tokens, "stop", tools)
    assert parsed.num_failed_tool_calls == 0
    message: Message = parsed.message
    return message


def thinks(rendering: Any, tokenizer: Any) -> Message:
    """A turn with thinking between the usual tags, of which the prompt may have the first."""
    prompt = rendering.render([USER], ())
    opened = tokenizer.decode(prompt).rstrip().endswith("<think>")
    text = ("" if opened else "<think>") + "Is it so?</think>Yes."
    tokens = [*tokenizer.encode(text, add_special_tokens=False), rendering.stop_token_ids[0]]
    message: Message = rendering.parse(prompt, tokens, "stop", ()).message
    return message


def called(message: Message | None) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in (message or {}).get("tool_calls", ())
    ]


def measured(name: str) -> tuple[str, ...]:
    """A row of the table."""
    rendering = rendering_for(name)
    one, results = calls(1)
    two, both = calls(2)
    thought, seen = calls(1, "Is it so?")
    parallel = called(reads(rendering, two, both, (TOOL,)))
    thinking = [
        (message or {}).get("reasoning_content", "").strip()
        for message in (
            reads(rendering, thought, seen, (TOOL,)),
            reads(rendering, ANSWER | {"reasoning_content": "Is it so?"}, [USER], ()),
            thinks(rendering, family_tokenizer(name)),
        )
    ]
    assert (reads(rendering, ANSWER, [USER], ()) or {})["content"].strip() == "Yes."
    return (
        name,
        "exact" if Family(name, family_tokenizer(name), keeps_thinking=True).continues else "branch",
        "read" if called(reads(rendering, one, results, (TOOL,))) == called(one) else "no",
        "read" if parallel == called(two) else "one at a time",
        "read" if "Is it so?" in thinking else "none",
    )


def rows() -> list[tuple[str, ...]]:
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    found = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in text.splitlines()]
    return [row for row in found if len(row) == 5 and row[1] in ("exact", "branch")]


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row[0]))
def test_the_table_says_what_a_family_can(row: tuple[str, ...]) -> None:
    assert measured(row[0]) == row


def test_the_table_has_every_family() -> None:
    assert sorted(row[0] for row in rows()) == sorted(set(family_names()) - NO_TOKENIZER)


CONTINUED = [row[0] for row in rows() if row[1] == "exact"]


@pytest.mark.parametrize("name", CONTINUED)
def test_a_continued_turn_has_the_end_of_a_whole_prompt(name: str) -> None:
    rendering = rendering_for(name)
    for turn, new, tools in ((ANSWER, [USER], ()), (*calls(1), (TOOL,)), (*calls(1, "Is it so?"), (TOOL,))):
        whole = rendering.render([USER, turn, *new], tools)
        prompt, tokens = sampled(rendering, turn, new, tools)
        added = rendering.continuation(prompt + tokens, len(prompt), [USER, turn], new, tools)
        assert whole == prompt + tokens + added


@pytest.mark.parametrize("name", CONTINUED)
def test_a_turn_that_was_cut_is_ended_or_branches_and_never_fails(name: str) -> None:
    rendering = rendering_for(name)
    turn, results = calls(2) if name not in ("llama-3", "deepseek-v4") else calls(1)
    prompt, tokens = sampled(rendering, turn, results, (TOOL,))
    whole = rendering.continuation(prompt + tokens, len(prompt), [USER, turn], results, (TOOL,))
    for length in range(1, len(tokens)):
        parsed = rendering.parse(prompt, tokens[:length], "length", (TOOL,))
        assert parsed.num_tool_calls <= 2
        user = rendering.continuation(prompt + tokens[:length], len(prompt), [USER, parsed.message], [USER], (TOOL,))
        if user is not None:
            assert any(token in rendering.stop_token_ids for token in [*tokens[:length], *user[:12]])
    assert whole is not None


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "glm-5", "deepseek-v3", "llama-3", "kimi-k2"])
def test_a_call_that_cannot_be_read_stays_text(name: str) -> None:
    rendering = rendering_for(name)
    turn, results = calls(1)
    prompt, tokens = sampled(rendering, turn, results, (TOOL,))
    tokenizer = family_tokenizer(name)
    for broken in ("{", "{}", '{"name": 3}', "[" * 5000, "\x00", '{"name": "look", "parameters": 3, "arguments": 3}'):
        ids = tokenizer.encode(broken, add_special_tokens=False)
        inside = [*tokens[:1], *ids, tokens[-1]] if name != "llama-3" else [*ids, tokens[-1]]
        parsed = rendering.parse(prompt, inside, "stop", (TOOL,))
        assert parsed.message["role"] == "assistant"
        assert isinstance(parsed.message["content"], str | None)
        assert "tool_calls" not in parsed.message or called(parsed.message)


def template_of(name: str, change: Any = lambda text: text) -> Any:
    """A tokenizer whose template writes as the family does, or nearly."""
    tokenizer = family_tokenizer(name)
    family = Family(name, tokenizer, keeps_thinking=False)
    return speaks(tokenizer, lambda messages, tools: change(tokenizer.decode(family.render(messages, tools or ()))))


@pytest.mark.parametrize("name", ["qwen3", "llama-3", "qwen3.8", "minimax-m2", "glm-5.3"])
def test_a_family_is_found_by_what_its_template_writes(name: str) -> None:
    tokenizer = template_of(name)
    assert detect(tokenizer, ChatTemplate(tokenizer)) == name
    rendering = rendering_of(AgentSection(environment="a:B"), tokenizer)
    turn, results = calls(1)
    assert rendering.render([USER, turn, *results], (TOOL,)) == rendering_for(name).render(
        [USER, turn, *results], (TOOL,)
    )


def test_a_changed_template_is_not_taken_for_the_familys() -> None:
    tokenizer = template_of("qwen3", lambda text: text.replace("tool_response>\n", "tool_response>"))
    assert detect(tokenizer, ChatTemplate(tokenizer)) is None
    assert len(PROBES) > 5


@pytest.mark.parametrize(("history", "kept"), [("exact", True), ("template", False)])
def test_thinking_that_the_template_drops_is_kept_or_branches(history: Any, kept: bool) -> None:
    """Qwen3 forgets what it thought when the user asks again."""
    tokenizer = template_of("qwen3")
    tree = EpisodeTree(rendering_of(AgentSection(environment="a:B", history=history), tokenizer), history=history)
    prepared = tree.prepare([USER], ())
    turn = tokenizer.encode("<think>\nIs it so?\n</think>\n\nYes.<|im_end|>", add_special_tokens=False)
    message = tree.add(
        prepared,
        pack_int32(turn),
        pack_float32([-1.0] * len(turn)),
        (VersionSpan(PolicyIdentity(3, "d"), 0, len(turn)),),
        "stop",
    ).message
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it so?"}
    again = tree.prepare([USER, message, USER], ())
    assert ("Is it so?" in tokenizer.decode(unpack_int32(again.prompt_ids))) is kept
    assert again.branch == (None if kept else "template")
