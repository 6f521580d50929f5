"""The rendering of a real model, SmolLM2, in random conversations; and what a configuration can ask for."""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.config.agent import AgentSection
from penstock.contracts.trajectories import Episode, EpisodeCounts, PolicyIdentity, Score, VersionSpan
from penstock.contracts.vocabulary import FinishReason
from penstock.contracts.wire import pack_float32, pack_int32, unpack_int32
from penstock.errors import CallRefusedError, ConfigError
from penstock.plain_tokens import plain_token_ids
from penstock_agent.capture.make import make_rendering, rendering_of
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.rendering import Rendering
from penstock_agent.capture.tree import EpisodeTree
from tests.real_model import real_model
from tests.unit.agent.capture.test_suffix import CHATML
from tests.unit.agent.capture.tokenizers import make_tokenizer

TOOL: Tool = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
USER: Message = {"role": "user", "content": "Well?"}


@cache
def smollm(tool_format: str = "auto", template: Literal["model", "plain"] = "model") -> Rendering:
    return make_rendering(
        AgentSection(environment="a:B", tool_format=tool_format, template=template), str(real_model())
    )


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_model())


def section(**values: Any) -> AgentSection:
    return AgentSection(environment="a:B", **values)


class Client:
    """Calls of an episode, with what the model samples as text or as any tokens."""

    def __init__(self, rendering: Rendering, tools: tuple[Tool, ...] = (), **options: Any) -> None:
        self.tree, self.tools = EpisodeTree(rendering, **options), tools
        self.sent: list[list[int]] = []

    def call(self, messages: list[Message], answer: list[int], finish: FinishReason = "stop") -> Message:
        prepared = self.tree.prepare(messages, self.tools)
        self.sent.append(unpack_int32(prepared.prompt_ids))
        spans = (VersionSpan(PolicyIdentity(1, "d"), 0, len(answer)),)
        return self.tree.add(prepared, pack_int32(answer), pack_float32([-1.0] * len(answer)), spans, finish).message

    def paths(self) -> list[list[int]]:
        episode = Episode(self.tree.nodes(), Score(1.0), "done", EpisodeCounts(), 0.0, 1.0)
        return [
            unpack_int32(b"".join(episode.nodes[each].token_ids for each in episode.path(node.parent)))
            for node in episode.nodes
            if node.is_sampled
        ]


def test_a_conversation_has_the_text_of_the_template_and_the_tokens_of_the_model() -> None:
    encode = tokenizer().encode
    apart = [*encode("un"), *encode("us"), *encode("ual"), tokenizer().eos_token_id]  # one word, in other tokens
    assert encode("unusual") != apart[:-1]
    client = Client(smollm())
    answer = client.call([USER], apart)
    assert answer == {"role": "assistant", "content": "unusual"}
    client.call([USER, answer, USER], [*encode("b"), tokenizer().eos_token_id])
    whole = smollm().render([USER, answer, USER], ())
    assert tokenizer().decode(client.sent[1]) == tokenizer().decode(whole)
    assert client.sent[1] != whole
    assert client.sent[1][len(client.sent[0]) :][: len(apart)] == apart


ANSWERS = st.lists(st.integers(3, 49151), min_size=1, max_size=8)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["go on", "edit", "retry", "compact", "sub-agent", "result"]),
        st.text(max_size=8),
        ANSWERS,
        st.sampled_from(["stop", "length"]),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
@pytest.mark.parametrize("with_tools", [True, False])
def test_every_call_is_sent_the_tokens_of_its_path(
    with_tools: bool, steps: list[tuple[str, str, list[int], FinishReason, int]]
) -> None:
    """Answers are any tokens, special ones apart, so most of them are not what their text would be tokenised to."""
    end = tokenizer().eos_token_id
    client = Client(smollm("hermes" if with_tools else "auto"), (TOOL,) if with_tools else ())
    messages: list[Message] = [USER]
    only_grew = True
    for kind, text, answer, finish, place in steps:
        asked = [*messages, {"role": "user", "content": text}]
        if kind == "edit":
            at = place % len(messages)
            asked = [*messages[:at], {**messages[at], "content": text + "!"}, *messages[at + 1 :], USER]
        elif kind == "retry" and client.sent:
            asked = messages[:-1] or asked
        elif kind == "compact":
            asked = [USER, {"role": "user", "content": text}]
        elif kind == "sub-agent":
            asked = [{"role": "system", "content": text}, USER]
        elif kind == "result" and with_tools:
            asked = [*messages, {"role": "tool", "tool_call_id": "x", "content": text}]
        only_grew = only_grew and kind in ("go on", "result")
        sampled = [*answer, end] if finish == "stop" else answer
        messages = [*asked, client.call(asked, sampled, finish)]
        if only_grew:
            whole = smollm("hermes" if with_tools else "auto").render(asked, client.tools)
            written = tokenizer().decode(client.sent[-1])
            assert len(client.sent) > 1 or client.sent[-1] == whole
            if "\ufffd" not in written:  # tokens of half a character are no text
                assert written == tokenizer().decode(whole)
    assert sorted(client.paths()) == sorted(client.sent)
    counts, nodes = client.tree.counts(), client.tree.nodes()
    parents = {node.parent for node in nodes}
    assert sum(index not in parents for index in range(len(nodes))) == 1 + sum(counts.branches.values())
    if only_grew:
        assert counts.branches == {}


def test_tools_of_a_template_without_them() -> None:
    with pytest.raises(CallRefusedError, match=r"template without tools.*agent\.tool_format"):
        smollm().render([USER], (TOOL,))
    with pytest.raises(CallRefusedError, match="template without tools"):
        smollm().render([USER, {"role": "tool", "content": "3"}], ())
    client = Client(smollm("hermes"), (TOOL,))
    text = 'Let me see. <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call><|im_end|>'
    turn = client.call([USER], tokenizer().encode(text))
    assert turn["content"] == "Let me see."
    (call,) = turn["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "saw 3"}
    client.call([USER, turn, result], tokenizer().encode("3<|im_end|>"))
    assert (
        tokenizer()
        .decode(client.sent[1])
        .endswith(
            "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nsaw 3\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    )
    assert client.tree.counts().num_tool_calls == 1
    assert client.tree.counts().branches == {}
    assert client.tree.transcript() == f"{text.removesuffix('<|im_end|>')}\nsaw 3\n3"


def test_calls_are_read_only_if_tools_are_offered() -> None:
    text = '<tool_call>{"name": "add"}</tool_call>'
    tokens = tokenizer().encode(text + "<|im_end|>")
    assert smollm("hermes").parse([1], tokens, "stop", ()).message == {"role": "assistant", "content": text}
    assert smollm("hermes").parse([1], tokens, "stop", (TOOL,)).num_tool_calls == 1


def test_thinking_is_apart_from_the_answer() -> None:
    for prompt, text in (("assistant\n", "<think>so</think>\nYes."), ("<think>\n", "so\n</think>\n\nYes.")):
        parsed = smollm().parse(tokenizer().encode(prompt), tokenizer().encode(text), "length", ())
        assert parsed.message == {"role": "assistant", "content": "Yes.", "reasoning_content": "so"}
        assert parsed.text == text
    cut = smollm().parse([1], tokenizer().encode("<think>so"), "length", ())
    assert cut.message == {"role": "assistant", "content": "", "reasoning_content": "so"}


def test_plain_texts_follow_each_other() -> None:
    plain = smollm(template="plain")
    assert plain.render([{"role": "user", "content": "Q: 1+1\n"}, USER], ()) == plain_token_ids(
        "Q: 1+1\nWell?", tokenizer()
    )
    newline = tokenizer().encode("\n")
    client = Client(plain)
    answer = client.call([USER], [*tokenizer().encode("calc 1+1"), *newline])
    assert answer["content"] == "calc 1+1"
    second = client.call([USER, answer, {"role": "user", "content": "= 2\n"}], tokenizer().encode("A: 2"), "length")
    client.call([USER, answer, {"role": "user", "content": "= 2\n"}, second, USER], newline)
    assert tokenizer().decode(client.sent[2]) == "Well?calc 1+1\n= 2\nA: 2Well?"
    assert client.tree.counts().branches == {}
    assert client.tree.transcript() == "calc 1+1\n= 2\nA: 2Well?"
    with pytest.raises(CallRefusedError, match=r"agent\.template is plain"):
        plain.render([USER], (TOOL,))
    with pytest.raises(CallRefusedError, match="no text"):
        plain.render([{"role": "user", "content": ""}], ())
    with pytest.raises(CallRefusedError, match="not text"):
        plain.render([{"role": "user", "content": [{"type": "image_url"}]}], ())


def test_what_a_template_refuses_is_a_fault_of_the_call() -> None:
    refusing = rendering_of(section(), make_tokenizer(["<|s|>", "<|e|>"], CHATML + "{{ raise_exception('never') }}"))
    with pytest.raises(CallRefusedError, match=r"refuses messages with roles user .*never"):
        refusing.render([USER], ())
    with pytest.raises(CallRefusedError, match="message 0 has content that is not text"):
        smollm().render([{"role": "user", "content": [{"type": "image_url"}]}], ())


def test_the_form_of_calls_is_found_in_the_template() -> None:
    source = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|e|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
    )
    own = make_tokenizer(["<|s|>", "<|e|>"], source)
    rendering = rendering_of(section(), own)
    turn = own.encode('<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "b"}</tool_call><|e|>')
    client = Client(rendering, (TOOL,))
    message = client.call([USER], turn)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "b"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in message["tool_calls"]]
    client.call([USER, message, *results], turn)
    assert own.decode(client.sent[1]).endswith("<|e|>\n<|s|>tool\n3<|e|>\n<|s|>tool\n3<|e|>\n<|s|>assistant\n")
    assert client.tree.counts().branches == {}
    unknown = rendering_of(section(), make_tokenizer(["<|s|>", "<|e|>"], source.replace("<tool_call>", "call ")))
    with pytest.raises(CallRefusedError, match=r"not known: expected .*agent\.tool_format hermes"):
        unknown.render([USER], (TOOL,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tool_format": "hermse"}, r"agent\.tool_format is 'hermse'.*did you mean 'hermes'"),
        ({"tool_format": "qwen3"}, r"agent\.tool_format is 'qwen3', which the tokenizer in actor\.path does not fit"),
        ({"template": "plain", "history": "template"}, r"agent\.history is template and agent\.template is plain"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_start(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rendering_of(section(**values), tokenizer())


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    bare = make_tokenizer(["<|e|>"])
    with pytest.raises(ConfigError, match=r"no chat template.*agent\.template plain"):
        rendering_of(section(), bare)
    assert rendering_of(section(template="plain"), bare).render([USER], ())
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"actor\.path is .*with a tokenizer"):
        make_rendering(section(), str(tmp_path))
    with pytest.raises(ConfigError, match="does not exist"):
        make_rendering(section(), str(tmp_path / "none"))
