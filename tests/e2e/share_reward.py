"""The reward of the end-to-end test: the share of one letter."""

from typing import Any


def share_of_a(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """Share of the completion's characters that are `answer`."""
    return completion.count(answer) / max(1, len(completion))
