"""What rendering the history again would change in what a model reads, and what exact capture costs.

`.venv/bin/python -m benchmarks.agents.drift` samples turns of SmolLM2-135M at temperature 1 and puts them into
conversations of growing length. Each call is sent by the product's own tree, and is also rendered whole from its
messages, as a server does that keeps no tokens. A token has drifted if the second prompt has another one for the same
text.
"""

import argparse
import difflib
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.config.agent import AgentSection
from penstock.contracts.trajectories import PolicyIdentity, VersionSpan
from penstock.contracts.wire import pack_float32, pack_int32, unpack_int32
from penstock_agent.capture.make import rendering_of
from penstock_agent.capture.messages import Message
from penstock_agent.capture.rendering import Rendering
from penstock_agent.capture.tree import EpisodeTree

MODEL = Path("models/SmolLM2-135M-Instruct")
POLICY = PolicyIdentity(0, "0" * 16)
QUESTIONS = (
    "Write a haiku about a river, then explain each word of it.",
    "List five unusual surnames and how they are pronounced.",
    "Write a small Python function that parses a date such as 2026-11-30.",
    "Add 5391 and 18466 step by step.",
    "Translate 'the water is cold' into three languages.",
    "Give the JSON of a shopping list with prices.",
    "Why do cats purr?",
    "Name three chemical compounds with their formulas.",
)
NEXT = ("Go on.", "Are you sure?", "Another one, please.", "Explain the second point.")


@dataclass
class Drift:
    """Of conversations with a number of turns: what the last call of each would read differently."""

    num_turns: int
    changed: list[bool]
    num_tokens: list[int]
    num_differing: list[int]
    last_seconds: list[float]

    def line(self) -> str:
        share = sum(self.num_differing) / sum(self.num_tokens)
        return (
            f"| {self.num_turns} | {statistics.mean(self.changed):.0%} | {statistics.mean(self.num_differing):.1f} "
            f"| {share:.2%} | {1e3 * statistics.median(self.last_seconds):.2f} |"
        )


def sample_turns(model: Any, tokenizer: Any, rendering: Rendering, num_turns: int, max_tokens: int) -> list[list[int]]:
    """Turns of the model, each with its end token if it came to one."""
    turns: list[list[int]] = []
    for number in range(0, num_turns, len(QUESTIONS)):
        torch.manual_seed(number)
        prompts = [rendering.render([{"role": "user", "content": question}], ()) for question in QUESTIONS]
        longest = max(map(len, prompts))
        padded = [[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            output = model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        for row in output[:, longest:].tolist():
            end = next((at + 1 for at, token in enumerate(row) if token == tokenizer.eos_token_id), len(row))
            turns.append(row[:end])
    return turns[:num_turns]


def measure(rendering: Rendering, turns: Sequence[Sequence[int]], num_turns: int, num_conversations: int) -> Drift:
    """Conversations of `num_turns` turns drawn from `turns`, each a path of a tree."""
    drift = Drift(num_turns, [], [], [], [])
    for seed in range(num_conversations):
        draw = random.Random(seed)
        tree = EpisodeTree(rendering)
        messages: list[Message] = [{"role": "user", "content": draw.choice(QUESTIONS)}]
        seconds = 0.0
        for _ in range(num_turns):
            turn = draw.choice(turns)
            start = time.perf_counter()
            prepared = tree.prepare(messages, ())
            size = len(turn)
            ended = turn[-1] in rendering.stop_token_ids
            spans = (VersionSpan(POLICY, 0, size),)
            answer = tree.add(
                prepared, pack_int32(turn), pack_float32([0.0] * size), spans, "stop" if ended else "length"
            )
            seconds = time.perf_counter() - start
            messages = [*messages, answer.message, {"role": "user", "content": draw.choice(NEXT)}]
        sent = unpack_int32(tree.prepare(messages, ()).prompt_ids)
        whole = rendering.render(messages, ())
        drift.last_seconds.append(seconds)
        drift.changed.append(sent != whole)
        drift.num_tokens.append(len(sent))
        drift.num_differing.append(_differing(sent, whole))
    return drift


def _differing(sent: list[int], whole: list[int]) -> int:
    """Tokens of the first that the second does not have in their place."""
    if sent == whole:
        return 0
    matcher = difflib.SequenceMatcher(None, sent, whole, autojunk=False)
    return len(sent) - sum(block.size for block in matcher.get_matching_blocks())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--sampled", type=int, default=64, help="turns that the model samples")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--conversations", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rendering = rendering_of(AgentSection(environment="benchmarks:none"), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    turns = sample_turns(model, tokenizer, rendering, arguments.sampled, arguments.max_tokens)
    apart = [turn for turn in turns if _rewritten(tokenizer, turn) != turn]
    print(f"{len(apart)} of {len(turns)} sampled turns have other tokens when their text is tokenised again\n")
    print("| turns | conversations that drift | tokens that differ | of all tokens | milliseconds of the last call |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for num_turns in arguments.turns:
        print(measure(rendering, turns, num_turns, arguments.conversations).line(), flush=True)


def _rewritten(tokenizer: Any, turn: list[int]) -> list[int]:
    """A turn as tokens of its text."""
    text = tokenizer.decode(turn, skip_special_tokens=False)
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return token_ids


if __name__ == "__main__":
    main()
