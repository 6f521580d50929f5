"""What a token costs on the host, from the engine's answer to a pack: CPU time and peak memory by stage and size.

Owns the shape of the work: groups of 16 long completions that share only their prompt, as in a reasoning task. Their
weights changed in the middle, so staleness is computed too; every other one has a reward. A slope is the power of the
size with which the cost of all tokens grows: 1 is linear. Memory is what Python and numpy allocate on top of the
messages. Each figure is the fastest of some passes: other work on the machine adds to all of them.

    .venv/bin/python -m benchmarks.token_path
"""

import argparse
import json
import math
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.tickets import make_ticket
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    VersionSpan,
    decode,
)
from penstock.contracts.stored_groups import (
    Part,
    RolloutHeader,
    ScoredHeader,
    scored_group,
    stored,
    texts_of,
)
from penstock.contracts.wire import encode
from penstock.tickets import TicketBook, TicketLimits
from penstock_rollout.engine.draft import Draft
from penstock_rollout.engine.sglang.answers import read_group
from penstock_rollout.engine.types import completions
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.rank_shares import share
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.rank_commands import Begin, Command
from penstock_trainer.learner.recipe import gradient_test

VERSION, MAX_LAG = 5, 4
NUM_PROMPT_TOKENS = 200
VOCAB_SIZE = 150_000
GROUP_SIZE = 16
NUM_RANKS = 8
RULES = BatchRules(Overlong(max_new_tokens=2**20))
OLDER, NEWER = PolicyIdentity(VERSION - 1, "0" * 16), PolicyIdentity(VERSION, "1" * 16)
KNOWN = {"older": OLDER, "newer": NEWER}
OUTSTANDING = (32, 128, 512, 2048, 8192)

CONFIG = {"actor": {"path": "model", "group_size": GROUP_SIZE}, "data": {"train": {"path": "prompts.jsonl"}}}

Stages = Mapping[str, Callable[[], object]]


def engine_answer(num_tokens: int) -> bytes:
    """SGLang's answer to a request for a group, as it comes over HTTP."""
    half = num_tokens // 2
    spans = [{"version": "older", "start": 0, "end": half}, {"version": "newer", "start": half, "end": num_tokens}]
    chance = random.Random(0)
    items = []
    for _ in range(GROUP_SIZE):
        ids = [chance.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
        meta = {
            "id": "0" * 32,
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": NUM_PROMPT_TOKENS,
            "weight_version": "newer",
            "weight_versions": spans,
            "output_token_logprobs": [[float(np.float32(-chance.random())), token, None] for token in ids],
            "cached_tokens": NUM_PROMPT_TOKENS,
            "completion_tokens": num_tokens,
            "e2e_latency": 1.5,
        }
        items.append({"text": "word" * num_tokens, "output_ids": ids, "meta_info": meta})
    return json.dumps(items).encode()


def completions_of(body: bytes, num_tokens: int) -> tuple[Completion, ...]:
    """The rollout service's work on an answer."""
    draft = Draft((1,), range(GROUP_SIZE), Sampling(1.0, num_tokens, ()), one_version_per_answer=False)
    draft.add(read_group(body, GROUP_SIZE))
    return completions(draft.group(), KNOWN)


def rollout_group(number: int, num_tokens: int, *, text: str = "") -> RolloutGroup:
    chance = np.random.default_rng(number)
    half = num_tokens // 2
    spans = (VersionSpan(OLDER, 0, half), VersionSpan(NEWER, half, num_tokens))
    answers = tuple(
        Completion(
            token_ids=chance.integers(VOCAB_SIZE, size=num_tokens, dtype=np.int32).tobytes(),
            loss_mask=None,
            logprobs=(-chance.random(num_tokens, dtype=np.float32)).tobytes(),
            spans=spans,
            text=text,
            finish_reason="stop",
        )
        for _ in range(GROUP_SIZE)
    )
    prompt_ids = chance.integers(VOCAB_SIZE, size=NUM_PROMPT_TOKENS, dtype=np.int32).tobytes()
    ticket = make_ticket(number, range(GROUP_SIZE), Sampling(1.0, num_tokens, ()), prompt_ids=prompt_ids)
    return RolloutGroup(ticket, answers, "benchmark", 0.0, 1.0)


def scored(group: RolloutGroup) -> ScoredGroup:
    return ScoredGroup(group, tuple(Score(float(index % 2)) for index in range(GROUP_SIZE)))


def group_stages(num_tokens: int) -> Stages:
    """What happens to one group on its way."""
    body = engine_answer(num_tokens)
    group = rollout_group(0, num_tokens, text="word" * num_tokens)
    message = stored(group)
    header = decode(message.header, RolloutHeader)
    scored_header = encode(ScoredHeader(header, scored(group).scores))
    arrived = scored(group.without_text())
    moves = gradient_test(Config.model_validate(CONFIG))
    parts: Mapping[Part, bytes | None] = message.parts
    return {
        "rollout: engine's JSON to completions": lambda: completions_of(body, num_tokens),
        "rollout: hand-over": lambda: stored(group),
        "reward: header and texts": lambda: texts_of(decode(message.header, RolloutHeader), parts[Part.TEXTS]),
        "trainer: decode": lambda: scored_group(decode(scored_header, ScoredHeader), parts),
        "trainer: judge a gradient": lambda: moves(arrived),
    }


def batch_stages(groups: Sequence[ScoredGroup], pack_tokens: int, folder: Path) -> Stages:
    """What happens to a batch, up to its last pack."""
    files = StepFiles(folder, 0)
    samples = make_batch(groups, RULES, version=VERSION, max_lag=MAX_LAG).samples
    command = Begin(tuple(groups), VERSION, 100)

    def packs(rank: int, num_ranks: int) -> None:
        for pack in share(samples, pack_tokens, rank, num_ranks).packs.made_ahead():
            pack.num_rows  # noqa: B018

    return {
        "step file": lambda: files.write(0, 1, groups),
        "make_batch": lambda: make_batch(groups, RULES, version=VERSION),
        "make_batch with max_lag": lambda: make_batch(groups, RULES, version=VERSION, max_lag=MAX_LAG),
        "packs of one rank": lambda: packs(0, 1),
        f"packs of one of {NUM_RANKS} ranks": lambda: packs(0, NUM_RANKS),
        "the ranks' command": lambda: sent_and_read(command),
    }


def sent_and_read(command: Begin) -> None:
    """As rank 0 writes a command for the others, and as each of them reads it."""
    data = bytearray()
    msgspec.msgpack.Encoder().encode_into(command, data)
    msgspec.msgpack.decode(memoryview(data), type=Command)


def whole_batch(groups: Sequence[ScoredGroup], pack_tokens: int, num_ranks: int) -> None:
    """From groups to the last pack, as a step of the trainer has it."""
    batch = make_batch(groups, RULES, version=VERSION, max_lag=MAX_LAG)
    for minibatch in batch.minibatches:
        for pack in share(minibatch, pack_tokens, 0, num_ranks).packs.made_ahead():
            pack.num_rows  # noqa: B018


def seconds_of(stage: Callable[[], object], num_passes: int) -> float:
    """CPU seconds of the fastest pass."""
    found = []
    for _ in range(num_passes):
        start = time.process_time()
        stage()
        found.append(time.process_time() - start)
    return min(found)


def peak_bytes(stage: Callable[[], object]) -> int:
    tracemalloc.start()
    stage()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def microseconds_per_arrival(num_outstanding: int, *, num_batches: int = 4) -> float:
    """CPU time of the book for each arrival, with all that the loop asks it, in a random order of arrivals."""
    limits = TicketLimits(num_outstanding // 2, num_outstanding, num_draws=num_batches * num_outstanding)
    book, chance = TicketBook(limits), random.Random(0)
    waiting = book.issue()
    num_arrivals, seconds = 0, 0.0
    while waiting and book.num_steps < num_batches:
        chance.shuffle(waiting)
        start = time.process_time()
        for number in waiting:
            num_arrivals += book.accepts(number)
            book.arrive(number, has_gradient=True)
            _ = book.finished, book.oldest_waiting
            if (batch := book.next_batch()) is not None:
                book.commit(batch)
        seconds += time.process_time() - start
        book.announce(book.num_steps)
        waiting = book.issue()
    return 1e6 * seconds / num_arrivals


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Of the largest size over the smallest; nan if there is one size only."""
    if len(sizes) == 1:
        return math.nan
    return math.log(costs[-1] / costs[0]) / math.log(sizes[-1] / sizes[0])


def table(title: str, sizes: Sequence[int], rows: Iterator[tuple[str, list[float]]], unit: str) -> None:
    """One line per row: the cost per unit at each size, and the slope of the full cost."""
    print(f"\n{title:<42}" + "".join(f"{size:>11}" for size in sizes) + f"{'slope':>8}")
    for name, costs in rows:
        per_unit = [cost / size for cost, size in zip(costs, sizes, strict=True)]
        print(f"{name:<42}" + "".join(f"{each:>11.1f}" for each in per_unit) + f"{slope(sizes, costs):>8.2f}")
    print(f"({unit})")


def measure_groups(lengths: Sequence[int], passes: int) -> Iterator[tuple[str, list[float]]]:
    """Nanoseconds of one completion of each length, by stage."""
    stages = [group_stages(length) for length in lengths]
    for name in stages[0]:
        yield name, [1e9 * seconds_of(each[name], passes) / GROUP_SIZE for each in stages]


def measure_batches(sizes: Sequence[int], options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Nanoseconds of each number of groups, over the tokens of one group, by stage."""
    groups = [scored(rollout_group(number, options.tokens)) for number in range(max(sizes))]
    num_tokens = GROUP_SIZE * options.tokens
    with tempfile.TemporaryDirectory() as folder:
        stages = [batch_stages(groups[:size], options.pack_tokens, Path(folder)) for size in sizes]
        for name in stages[0]:
            yield name, [1e9 * seconds_of(each[name], options.passes) / num_tokens for each in stages]
    for num_ranks in (1, NUM_RANKS):
        name = f"peak bytes, rank 0 of {num_ranks}"
        peaks = [peak_bytes(partial(whole_batch, groups[:size], options.pack_tokens, num_ranks)) for size in sizes]
        yield name, [peak / num_tokens for peak in peaks]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 16, 64], help="sizes of a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="sizes of a completion")
    parser.add_argument("--tokens", type=int, default=4096, help="of each completion in a batch")
    parser.add_argument("--pack-tokens", type=int, default=16384, help="actor.max_tokens_per_micro_batch")
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args(arguments)
    table(
        f"a group of {GROUP_SIZE} completions of length",
        options.lengths,
        measure_groups(options.lengths, options.passes),
        "CPU nanoseconds a token",
    )
    table(
        f"a batch of groups of {GROUP_SIZE} x {options.tokens}",
        options.groups,
        measure_batches(options.groups, options),
        "CPU nanoseconds a token; bytes a token on top of the messages",
    )
    arrivals = [microseconds_per_arrival(size) for size in OUTSTANDING]
    print(f"\n{'outstanding tickets':<42}" + "".join(f"{size:>11}" for size in OUTSTANDING) + f"{'slope':>8}")
    line = "".join(f"{each:>11.2f}" for each in arrivals)
    print(f"{'the book, CPU microseconds an arrival':<42}{line}{1 + slope(OUTSTANDING, arrivals):>8.2f}")


if __name__ == "__main__":
    main()
