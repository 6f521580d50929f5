"""What an episode of many turns costs to train: one row per turn against the trie of its paths.

Owns the shapes of the episodes. Invariant: both sides compute the same loss of the same tokens with the same weights,
by the same attention, in passes of at most as many rows; they differ only in what they compute once. A random model on
one thread of a CPU. Start it alone on a quiet machine, from the repository's root:

    .venv/bin/python -m benchmarks.agents.path

kept      each turn goes on from all before it: an episode is one path
stripped  the template strips the thinking of earlier turns, so that each turn is a branch
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from random import Random
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.counted_memory import counted
from benchmarks.learner_side import relative_difference
from benchmarks.tickets import make_ticket
from penstock.contracts import (
    Episode,
    EpisodeCounts,
    Node,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    VersionSpan,
    pack_float32,
    pack_int32,
    unpack_int32,
)
from penstock_trainer.batching.batch import BatchRules, Overlong, Sample, make_batch
from penstock_trainer.batching.packing import Pack, make_packs
from penstock_trainer.grpo import Objective, Tokens, micro_batch_loss, ppo_clip
from penstock_trainer.model.pack_model import PackModel

History = Literal["kept", "stripped"]
NUM_EPISODES = 2  # of one ticket
NUM_PROMPT, NUM_THINKING, NUM_ANSWER, NUM_RESULT = 94, 10, 6, 12  # tokens; of each turn but the first
VOCABULARY = 2048
LOGPROB = -7.6  # about that of a token of a random model, so that ratios are near 1
HEADER = (
    "| History | turns | rows, per turn | rows, trie | ratio | s, per turn | s, trie | ratio | MiB, per turn "
    "| MiB, trie | gradients differ by |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)
POLICY = PolicyIdentity(0, "0" * 16)


@dataclass(frozen=True)
class Measured:
    """One side: rows of its passes, the seconds of a forward and backward pass of all, the peak of live tensors."""

    num_rows: int
    num_passes: int
    seconds: float
    peak_bytes: int
    gradients: dict[str, Tensor]


def make_episode(num_turns: int, history: History, seed: int) -> Episode:
    """A prompt, and turns of thinking, an answer and a tool's result."""
    random, first = Random(seed), Random(0)

    def draw(count: int, source: Random = random) -> bytes:
        return pack_int32(source.choices(range(3, VOCABULARY), k=count))

    nodes = [Node(-1, draw(NUM_PROMPT, first), role="system")]
    base = 0
    for _ in range(num_turns):
        ids = draw(NUM_THINKING + NUM_ANSWER)
        count = len(ids) // 4
        nodes.append(Node(base, ids, pack_float32([LOGPROB] * count), (VersionSpan(POLICY, 0, count),), "assistant"))
        if history == "kept":
            nodes.append(Node(len(nodes) - 1, draw(NUM_RESULT), role="tool"))
        else:
            nodes.append(Node(base, ids[4 * NUM_THINKING :] + draw(NUM_RESULT), role="tool"))
        base = len(nodes) - 1
    return Episode(tuple(nodes), Score(1.0), "done", EpisodeCounts(num_turns=num_turns), 0.0, 1.0)


def make_group(num_turns: int, history: History) -> ScoredGroup:
    """Episodes of one ticket, with rewards 0, 1, 2 ..."""
    ticket = make_ticket(
        0, range(NUM_EPISODES), Sampling(1.0, NUM_THINKING + NUM_ANSWER, ()), environment="benchmarks:none"
    )
    episodes = tuple(make_episode(num_turns, history, seed) for seed in range(1, NUM_EPISODES + 1))
    scores = tuple(Score(float(index)) for index in range(NUM_EPISODES))
    return ScoredGroup(RolloutGroup(ticket, (), "benchmark", 0.0, 1.0, episodes), scores)


def turn_samples(group: ScoredGroup, samples: Sequence[Sample]) -> list[Sample]:
    """One sample per turn: the tokens before it, then its own. Advantage and weight are those of its episode."""
    shares = {sample.index: sample for sample in samples}
    turns = []
    for index, share in shares.items():
        found = group.group.episodes[index.completion]
        for number, node in enumerate(found.nodes):
            if node.is_trained:
                before = [each for at in found.path(number)[:-1] for each in unpack_int32(found.nodes[at].token_ids)]
                turns.append(one_turn(share, before, unpack_int32(node.token_ids)))
    return turns


def one_turn(share: Sample, before: Sequence[int], own: Sequence[int]) -> Sample:
    count = len(own)
    return replace(
        share,
        prompt_ids=np.array(before, dtype=np.int32),
        token_ids=np.array(own, dtype=np.int32),
        loss_mask=np.ones(count, dtype=np.bool_),
        behaviour=np.full(count, LOGPROB, dtype=np.float32),
        lags=np.zeros(count, dtype=np.int32),
    )


def side_by_side(packs: Sequence[Pack]) -> Pack:
    """Packs as one that shares nothing: a row after the other, each seeing only its own."""
    rows = [0, *accumulate(pack.num_rows for pack in packs)]
    parents = [0, *accumulate(pack.parents_R.numel() for pack in packs)]
    pairs = [0, *accumulate(pack.target_token_U.numel() for pack in packs)]
    sequences = [0, *accumulate(pack.num_sequences for pack in packs)]
    offsets = {
        "subtree_end_P": rows,
        "parents_R": rows,
        "target_parent_U": parents,
        "target_N": pairs,
        "sequence_N": sequences,
    }
    tensors = {
        field.name: torch.cat(
            [getattr(pack, field.name) + offsets.get(field.name, [0] * len(rows))[at] for at, pack in enumerate(packs)]
        )
        for field in fields(Pack)
        if field.name not in ("indices", "paths", "experts_PW", "teacher_logprobs_N")  # neither replay nor teacher
    }
    return Pack(
        **tensors,
        indices=tuple(index for pack in packs for index in pack.indices),
        paths=tuple(path for pack in packs for path in pack.paths),
    )


def row_packs(samples: Sequence[Sample], max_tokens: int) -> list[Pack]:
    """One row per turn, as many of them in a pass as fit."""
    passes: list[list[Pack]] = [[]]
    for sample in sorted(samples, key=lambda each: each.prompt_ids.size):
        (single,) = make_packs([sample], 2**30)
        if passes[-1] and sum(pack.num_rows for pack in passes[-1]) + single.num_rows > max_tokens:
            passes.append([])
        passes[-1].append(single)
    return [side_by_side(packs) for packs in passes]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=8192,
        )
    )


def train(policy: PackModel, packs: Sequence[Pack]) -> None:
    """Forward and backward passes of all packs; gradients add up."""
    objective = Objective(lambda *arguments: ppo_clip(*arguments, eps_low=0.2, eps_high=0.2))
    for pack in packs:
        logprobs_U, _ = policy.token_logprobs(pack)
        tokens = Tokens(
            logprobs_N=logprobs_U.index_select(0, pack.target_N),
            behaviour_logprobs_N=pack.behaviour_logprobs_N,
            advantage_N=pack.advantage_N,
            weight_N=pack.weight_N,
            sequence_N=pack.sequence_N,
            num_sequences=pack.num_sequences,
        )
        micro_batch_loss(tokens, objective)[0].backward()


def measure(packs: Sequence[Pack]) -> Measured:
    model = make_model()
    policy = PackModel(model, dtype=torch.float32, temperature=1.0)
    largest = max(packs, key=lambda pack: pack.num_rows)
    train(policy, [largest])  # gradients exist from now on, and nothing is made for the first time
    memory = counted(lambda: train(policy, [largest]))
    model.zero_grad()
    start = time.perf_counter()
    train(policy, packs)
    seconds = time.perf_counter() - start
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return Measured(sum(pack.num_rows for pack in packs), len(packs), seconds, memory.peak_bytes, gradients)


def line(num_turns: int, history: History, max_tokens: int) -> str:
    """A line of the table. Each side makes its packs and frees them before the other begins."""
    group = make_group(num_turns, history)
    samples = make_batch([group], BatchRules(Overlong(2**20)), version=0).samples
    sides: tuple[Callable[[], list[Pack]], ...] = (
        lambda: row_packs(turn_samples(group, samples), max_tokens),
        lambda: make_packs(samples, max_tokens),
    )
    rows, trie = (measure(make()) for make in sides)
    difference = relative_difference(trie.gradients, rows.gradients)
    return (
        f"| {history} | {num_turns} | {rows.num_rows} | {trie.num_rows} | {rows.num_rows / trie.num_rows:.1f} "
        f"| {rows.seconds:.2f} | {trie.seconds:.2f} | {rows.seconds / trie.seconds:.1f} "
        f"| {rows.peak_bytes / 2**20:.0f} | {trie.peak_bytes / 2**20:.0f} | {difference:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="One row per turn against the trie.")
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 8, 32, 64], help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=2048, help="rows of a pass (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {NUM_EPISODES} episodes; load before: {os.getloadavg()[0]:.2f}\n")
    print(HEADER)
    histories: tuple[History, ...] = ("kept", "stripped")
    for history in histories:
        for num_turns in arguments.turns:
            print(line(num_turns, history, arguments.max_tokens), flush=True)
    print(f"\nload after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
