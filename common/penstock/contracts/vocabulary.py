"""Closed sets of words: kinds, states, reasons and modes.

Owns their spelling, once for messages, ledger, metrics and configuration. Invariant: the word itself is written, as
JSON, MessagePack, a label or a value of the configuration. A message with an unknown word is refused, and the error
names the word. Values that a user sets are a `Literal`; values that the program reports are an enum, which the labels
iterate.
"""

from enum import StrEnum
from typing import Literal

Purpose = Literal["train", "eval"]
"""Of a ticket."""
FinishReason = Literal["stop", "length", "abort"]
"""Why a completion ended."""
EpisodeEnd = Literal["done", "max_turns", "max_tokens", "timeout", "failure"]
"""Why an episode ended. done: its environment or agent ended it; failure: the infrastructure did."""
Cut = Literal["max_turns", "max_tokens"]
"""The limits at which an episode ends: keys of `agent`."""
BranchReason = Literal["template", "edited", "compacted", "subagent", "sibling"]
"""Why a call opened a branch of its episode.

template: the template writes an earlier turn in another way than it was sampled, or does not show how one continues.
edited: a message of the history was changed, or the tools that the prompt shows. compacted: the call has fewer messages
than one before. subagent: another conversation. sibling: the same messages were asked again.
"""
Dtype = Literal["float32", "bfloat16"]
"""Of weights."""
Rounding = Literal["dithered", "nearest"]
"""How float32 becomes bfloat16 when weights are staged."""
PauseMode = Literal["retract", "in_place", "abort"]
"""What running requests do when new weights come: `weights.pause_mode`."""
BUILTIN_REWARDS = ("exact_match", "numeric", "gsm8k", "math", "format_regex", "reasoning_gym")
"""Reward functions that every run has, by name: a row may name one."""
MAIN_SET = "main"
"""The set of held-out prompts in `data.eval`, beside those of `eval.sets`."""
ENVIRONMENT_REWARD = "environment"
"""The score that the environment gave to an episode, as one more reward function of a run with agents."""
UNUSABLE_TASKS = {
    "propositional_logic": "its scorer pays in full for a premise that is copied from the question",
}
"""Tasks of reasoning-gym that are refused, and why."""


class ServiceKind(StrEnum):
    """The kind of a service."""

    ROLLOUT = "rollout"
    AGENT = "agent"
    REWARD = "reward"
    TRAINER = "trainer"


class ServerState(StrEnum):
    """The state of a rollout server."""

    STARTING = "starting"
    """Its engine does not answer yet: nothing is pushed to it, and it loads the announced version by itself."""
    WAITING = "waiting"
    """No weights are loaded."""
    UPDATING = "updating"
    SERVING = "serving"
    PAUSED = "paused"
    """Generation is held by `POST /v1/pause`."""
    ASLEEP = "asleep"
    """It uses no GPU memory, because it is the trainer's turn (`trainer.take_turns`)."""
    FENCED = "fenced"
    """It missed the last pushed weights, and takes no ticket until it has loaded the announced ones."""


class DropReason(StrEnum):
    """Why a ticket ended without being trained."""

    STALE = "stale"
    """When its batch closed, its group was too old (`staleness.order` ready)."""
    DEGENERATE = "degenerate"
    """Its rewards give no gradient, and `dynamic_sampling` is on."""
    REWARD_FAILED = "reward_failed"
    """Too few of its completions have a reward."""
    POISON = "poison"
    """No service could use its message: it is a dead letter."""


class ReissueReason(StrEnum):
    """Why a ticket was issued again."""

    VERSION = "version"
    """The trainer has no record of the weights that generated its group."""
    SAMPLING = "sampling"
    """Its group was sampled with other values of `sampling` than the configuration has now."""
    STALE = "stale"
    """When its batch closed, its group was too old (`staleness.order` ticket)."""
    TEACHER = "teacher"
    """Its group was scored before `teacher.urls` named the servers of a teacher."""
    LOST = "lost"
    """The queue had lost it when the trainer started."""
