"""An agent of one's own: answers a question about a stock with a tool, and prints how well it did.

It is an ordinary program that uses the `openai` SDK, and contains nothing of Penstock:

    echo '{"prompt": "How many figs and limes are there together?", "answer": "23"}' | python agent.py

asks the model of OPENAI_BASE_URL with OPENAI_API_KEY. The row is JSON on standard input; the last line of the output is
the reward.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

STOCK: dict[str, int] = json.loads((Path(__file__).parent / "stock.json").read_text())
SYSTEM = "You answer questions about a shop. Look up each item with a tool. Answer with one number."
MAX_TURNS = 6
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "stock",
            "description": "How many pieces of an item there are.",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string", "description": "its name, in the plural"}},
                "required": ["item"],
            },
        },
    }
]


def look_up(arguments: str) -> str:
    """The result of the tool, as the model reads it."""
    try:
        item = json.loads(arguments)["item"].lower()
    except (ValueError, TypeError, KeyError, AttributeError):
        return 'error: expected {"item": "..."}'
    return str(STOCK[item]) if item in STOCK else f"error: no {item}; there are {', '.join(STOCK)}"


def answer(question: str) -> str:
    """Talk to the model until it asks for no tool."""
    client = OpenAI(max_retries=5, timeout=600)  # the SDK repeats what failed on the way
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(model="policy", messages=messages, tools=TOOLS).choices[0].message
        messages.append(reply.model_dump(exclude_none=True))
        if not reply.tool_calls:
            return reply.content or ""
        for call in reply.tool_calls:
            result = look_up(call.function.arguments) if call.type == "function" else "error: no such tool"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


def main() -> None:
    """One row, from standard input to a reward."""
    row = json.load(sys.stdin)
    text = answer(row["prompt"])
    numbers = re.findall(r"\d+", text)
    print(f"{row['prompt']} {text}")
    print(float(numbers[-1:] == [row["answer"]]))


if __name__ == "__main__":
    main()
