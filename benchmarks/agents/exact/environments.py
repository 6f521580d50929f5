"""What makes the episodes, as a user writes it. Imports nothing of Penstock: it runs in the agent service's workers."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import httpx

STOCK = {"figs": 6, "limes": 17, "plums": 31, "pears": 9, "kiwis": 45, "melons": 3}
CALL_SECONDS = 300
Message = dict[str, Any]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def _shown(item: str) -> list[Message]:
    """A question that is answered with the tool."""
    call = {"id": item, "type": "function", "function": {"name": "stock", "arguments": f'{{"item": "{item}"}}'}}
    return [
        user(f"How many {item} are there?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": item, "name": "stock", "content": str(STOCK[item])},
        {"role": "assistant", "content": f"There are {STOCK[item]} {item}."},
    ]


class Shop:
    """A shop, of which the model may ask how many pieces of an item there are."""

    def reset(self, answer: str, item: str, **row: Any) -> list[Message]:
        """Two answered questions, and one to answer."""
        self.answer = answer
        others = [each for each in STOCK if each != item][:2]
        return [*_shown(others[0]), *_shown(others[1]), user(f"How many {item} are there?")]

    def stock(self, item: str) -> int:
        """How many pieces of an item there are."""
        return STOCK[item.lower()]

    def get_reward(self, text: str) -> float:
        """Whether the last text has the number."""
        return float(self.answer in text)


async def wander(row: dict[str, Any], base_url: str, api_key: str) -> float:
    """An agent that does to its history whatever agents do, with a client of its own."""
    opening = [{"role": "system", "content": row["system"]}, user(row["question"])]
    client = httpx.AsyncClient(
        base_url=base_url, headers={"Authorization": f"Bearer {api_key}"}, timeout=CALL_SECONDS, trust_env=False
    )
    async with client:
        first = await _ask(client, opening)
        told = [*opening, first, user(row["next"])]
        # Two answers to the same messages at the same time: siblings. Both are continued.
        second, other = await asyncio.gather(_ask(client, told), _ask(client, told))
        longer = [*told, second, user(row["next"])]
        # An answer that its length ends. Meanwhile, the other one goes on.
        third, _ = await asyncio.gather(
            _ask(client, longer, max_tokens=5), _ask(client, [*told, other, user(row["next"])])
        )
        longest = [*longer, third, user(row["next"])]
        await _ask(client, longest)
        # The history with another first answer than the model's; an agent beside it; one that forgot most; a title.
        edited = {**first, "content": row["edit"]}
        await asyncio.gather(
            _ask(client, [*opening, edited, *longest[3:], user(row["next"])]),
            _ask(client, [{"role": "system", "content": row["helper"]}, user(row["question"])]),
            _ask(client, [*opening, user(row["summary"])]),
            _ask(client, [user(row["title"])], auxiliary=True),
        )
    return float(len(str(second.get("content"))) % 7)


async def _ask(
    client: httpx.AsyncClient, messages: Sequence[Message], *, max_tokens: int | None = None, auxiliary: bool = False
) -> Message:
    await asyncio.sleep(random.uniform(0, 0.02))  # so that calls of siblings come in any order
    body: dict[str, Any] = {"model": "policy", "messages": messages}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    headers = {"X-Penstock-Auxiliary": "1"} if auxiliary else {}
    answer = await client.post("/chat/completions", json=body, headers=headers)
    answer.raise_for_status()
    message: Message = answer.json()["choices"][0]["message"]
    return message
