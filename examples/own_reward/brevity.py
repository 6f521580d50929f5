"""A reward function of one's own: sentences of a wanted length.

Penstock calls it for every completion in a worker process, with the keywords below. It may be `async`. An exception
or a call over `reward.timeout_seconds` counts as failed, never as 0.
"""

from typing import Any


def wanted_length(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 for exactly `metadata["num_words"]` words, less by the relative difference, at least 0."""
    wanted = int(metadata["num_words"])
    return max(0.0, 1.0 - abs(len(completion.split()) - wanted) / wanted)
