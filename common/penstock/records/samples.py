"""A line of `samples.jsonl` or `dropped.jsonl`: one completion or episode of training, for people to read.

Owns its fields, once for the trainer that writes them, for the trackers that show them as a table, and for readers.
Invariant: what is not known is None or empty, never 0. A reader ignores fields that it does not know, so that it can
read the lines of other releases.
"""

import msgspec


class SampleLine(msgspec.Struct, frozen=True):
    """One completion, as it was trained; long texts are cut in the middle.

    version: of the oldest weights that sampled a token of it. ticket, index: its group, and its place in the group.
    completion: its text; of an episode the turns behind its first prompt. rewards: of each reward function, before its
    weight; None: it failed. failure: why there is no reward. advantage: None if it had none: its reward failed, or too
    few of its group have one. num_tokens: sampled. truncated: it ended by a limit (`sampling.max_new_tokens`,
    `agent.max_turns` or `agent.max_tokens`).
    """

    step: int
    version: int | None
    ticket: int
    index: int
    prompt: str
    completion: str
    answer: str
    reward: float | None
    rewards: dict[str, float | None] = {}
    failure: str = ""
    advantage: float | None = None
    num_tokens: int = 0
    truncated: bool = False


class DroppedLine(SampleLine, frozen=True, kw_only=True):
    """A completion without a reward whose group no step trains. step: the one whose batch was collected then.

    dropped: why the group ended without training, a reason of the ledger.
    """

    dropped: str
