"""The client and the rendering of a real model: tools in hermes' form, tokens that no text would give again."""

import json
import re
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoTokenizer

from penstock.config.agent import AgentSection
from penstock.contracts import Sampling, unpack_int32
from penstock_agent.capture.make import make_rendering
from tests.integration.agent.gateway.serving import serving
from tests.patience import ANSWER_SECONDS
from tests.real_model import real_model
from tests.unit.agent.gateway.pretend import TOOL, check_record


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_and_turns_with_a_real_template(stream: bool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(real_model())
    rendering = make_rendering(AgentSection(environment="a:B", tool_format="hermes"), str(real_model()))
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 52, "y": 39}}\n</tool_call>'

    def in_letters(text: str) -> list[int]:
        """Each letter apart: encoding the text would give other tokens."""
        return [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False)]

    async with (
        serving(rendering=rendering, max_tokens=4096) as gateway,
        gateway.open(sampling=Sampling(1.0, 512, ())) as session,
        AsyncOpenAI(base_url=session.base_url, api_key=session.key, timeout=ANSWER_SECONDS, max_retries=0) as client,
    ):
        servers = gateway.servers
        servers.encode, servers.stop = in_letters, tokenizer.eos_token_id
        servers.decode = lambda packed: tokenizer.decode(unpack_int32(packed))
        servers.reply = lambda prompt, asked: "It is 91." if "is 91" in prompt else f"I add. {call}{call}"
        messages: Any = [{"role": "user", "content": "What is 52 + 39?"}]
        first = await _said(client, messages, stream)
        assert first["content"].strip() == "I add."
        assert [json.loads(each["function"]["arguments"]) for each in first["tool_calls"]] == 2 * [{"x": 52, "y": 39}]
        results = [
            {"role": "tool", "tool_call_id": each["id"], "content": "the sum is 91"} for each in first["tool_calls"]
        ]
        last = await _said(client, [*messages, first, *results], stream)
        assert last["content"] == "It is 91."
    check_record(session, servers)
    (one, sampled), (two, _) = servers.answered
    assert two.prompt_ids.startswith(one.prompt_ids + sampled.token_ids)
    assert servers.decode(two.prompt_ids).count("the sum is 91") == 2
    assert session.counts().branches == {}
    assert session.counts().num_tool_calls == 2


@pytest.mark.parametrize("template", ["model", "plain"])
async def test_an_end_of_a_turn_is_a_stop_text_and_has_a_text_in_log_probabilities(
    template: Literal["model", "plain"],
) -> None:
    rendering = make_rendering(AgentSection(environment="a:B", template=template), str(real_model()))
    tokenizer: Any = AutoTokenizer.from_pretrained(real_model())
    (newline,) = tokenizer.encode("\n")
    async with (
        serving(rendering=rendering, max_tokens=4096) as gateway,
        gateway.open(sampling=Sampling(1.0, 512, (newline,))) as session,
        AsyncOpenAI(base_url=session.base_url, api_key=session.key, timeout=ANSWER_SECONDS, max_retries=0) as client,
    ):
        servers = gateway.servers
        servers.encode, servers.stop = tokenizer.encode, tokenizer.eos_token_id
        servers.decode = lambda packed: tokenizer.decode(unpack_int32(packed))
        answer = await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "Well?"}], stop=["<|im_end|>", "\n"], logprobs=True
        )
        shown = answer.choices[0].logprobs
        assert shown is not None
        assert shown.content is not None
        assert shown.content[-1].token == "<|im_end|>"
        with pytest.raises(BadRequestError, match=re.escape(r'expected some of ["\n","<|im_end|>"]')):
            await client.chat.completions.create(
                model="any", messages=[{"role": "user", "content": "Well?"}], stop=["Observation:"]
            )


async def _said(client: AsyncOpenAI, messages: Any, stream: bool) -> dict[str, Any]:
    """The model's next message, as a client sends it back."""
    tools: Any = [TOOL]
    if not stream:
        answer = await client.chat.completions.create(model="any", messages=messages, tools=tools)
        return answer.choices[0].message.model_dump()
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    async for chunk in await client.chat.completions.create(model="any", messages=messages, tools=tools, stream=True):
        delta = chunk.choices[0].delta
        message["content"] += delta.content or ""
        message["tool_calls"] += [each.model_dump(exclude={"index"}) for each in delta.tool_calls or ()]
    return message
