"""What a batch costs on the host before its first forward pass: CPU time and peak memory per token, by stage.

Owns the shape of the batch: long completions that share only their prompt, as in a reasoning task. Their weights
changed in the middle, so staleness is computed too. Memory is what Python and numpy allocate on top of the messages.

    .venv/bin/python -m benchmarks.batch_cost
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.tickets import make_ticket
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    VersionSpan,
)
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.batching.rank_shares import share

VERSION, MAX_LAG = 5, 4
NUM_PROMPT_TOKENS = 200
VOCAB_SIZE = 150_000
RULES = BatchRules(Overlong(max_new_tokens=2**20))


@dataclass(frozen=True)
class Cost:
    """The cost of one stage: its fastest pass, and the peak memory of a pass."""

    nanoseconds_per_token: float
    bytes_per_token: float


def scored_groups(num_groups: int, group_size: int, num_tokens: int) -> list[ScoredGroup]:
    """Groups in which every other completion has a reward; the version before generated the first half of each."""
    random = np.random.default_rng(0)
    half = num_tokens // 2
    spans = tuple(
        VersionSpan(PolicyIdentity(VERSION - lag, "0" * 16), start, end)
        for lag, start, end in ((1, 0, half), (0, half, num_tokens))
    )
    groups = []
    for number in range(num_groups):
        completions = tuple(
            Completion(
                token_ids=random.integers(VOCAB_SIZE, size=num_tokens, dtype=np.int32).tobytes(),
                loss_mask=None,
                logprobs=(-random.random(num_tokens, dtype=np.float32)).tobytes(),
                spans=spans,
                text="",
                finish_reason="stop",
            )
            for _ in range(group_size)
        )
        ticket = make_ticket(
            number,
            range(group_size),
            Sampling(1.0, num_tokens, ()),
            prompt_ids=random.integers(VOCAB_SIZE, size=NUM_PROMPT_TOKENS, dtype=np.int32).tobytes(),
        )
        scores = tuple(Score(float(index % 2)) for index in range(group_size))
        groups.append(ScoredGroup(RolloutGroup(ticket, completions, "benchmark", 0.0, 1.0), scores))
    return groups


def cost(stage: Callable[[], object], num_tokens: int, num_passes: int) -> Cost:
    seconds = []
    for _ in range(num_passes):
        start = time.process_time()
        stage()
        seconds.append(time.process_time() - start)
    tracemalloc.start()  # in a pass of its own, since tracing takes time
    stage()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cost(1e9 * min(seconds) / num_tokens, peak / num_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="of each completion")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="actor.max_tokens_per_micro_batch")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args(arguments)
    groups = scored_groups(options.groups, options.group_size, options.tokens)
    num_tokens = options.groups * options.group_size * options.tokens
    samples = make_batch(groups, RULES, version=VERSION, max_lag=MAX_LAG).samples
    stages: dict[str, Callable[[], object]] = {
        "make_batch": lambda: make_batch(groups, RULES, version=VERSION, max_lag=MAX_LAG),
        "make_packs": lambda: make_packs(samples, options.pack_tokens),
        f"share of {options.ranks} ranks": lambda: share(samples, options.pack_tokens, 0, options.ranks),
    }
    print(f"{options.groups} groups x {options.group_size} x {options.tokens} tokens")
    print(f"{'stage':<20}{'ns/token':>10}{'peak bytes/token':>18}")
    for name, stage in stages.items():
        found = cost(stage, num_tokens, options.passes)
        print(f"{name:<20}{found.nanoseconds_per_token:>10.2f}{found.bytes_per_token:>18.1f}")


if __name__ == "__main__":
    main()
