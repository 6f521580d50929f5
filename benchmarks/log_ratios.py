"""What it costs to record trainer minus sampler of each token: CPU time and bytes, beside those of the step file.

    python -m benchmarks.log_ratios                       # 64 groups x 16 completions x 1024 tokens
    python -m benchmarks.log_ratios --groups 8 --completions 24 --tokens 4

Makes a batch of random tokens, packs it, and records of each pack what an update records: the model's forward and
backward pass is left out, so the share of a real step is far below the ratios that are printed. CPU time, since other
work of the machine does not change it.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.synthetic_run import completion, group
from penstock.contracts import ScoredGroup
from penstock.contracts.log_ratios import SUFFIX
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.log_ratios import LogRatios, RankLogRatios

REPEATS = 3
PACK_TOKENS = 8192
PROMPT_TOKENS = 64
VOCABULARY = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--completions", type=int, default=16, help="of a group")
    parser.add_argument("--tokens", type=int, default=1024, help="of a completion")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups = batch(arguments.groups, arguments.completions, arguments.tokens)
    num_tokens = sum(each.num_tokens for one in groups for each in one.group.trajectories)
    print(f"{num_tokens:,} sampled tokens; CPU seconds, the least of {REPEATS}")
    found = [measure(groups) for _ in range(REPEATS)]
    least = {name: min(each[name] for each in found) for name in found[0] if name.endswith("seconds")}
    for name, what in (
        ("pack_seconds", "make the packs of the update"),
        ("note_seconds", "note the log-ratios of its packs, within the update"),
        ("step_file_seconds", "write the step file"),
        ("write_seconds", "place and write the log-ratios, beside the next step"),
    ):
        print(f"{what:55} {least[name]:8.4f} s")
    bytes_ = found[0]
    print(f"noted / packed {least['note_seconds'] / least['pack_seconds']:.2f}", end="; ")
    print(f"log-ratios / step file: time {least['write_seconds'] / least['step_file_seconds']:.2f}", end=", ")
    print(f"bytes {bytes_['log_ratio_bytes']:,.0f} / {bytes_['step_file_bytes']:,.0f}", end=" = ")
    print(f"{bytes_['log_ratio_bytes'] / bytes_['step_file_bytes']:.3f}", end=", ")
    print(f"{bytes_['log_ratio_bytes'] / num_tokens:.2f} a token")


def batch(num_groups: int, group_size: int, num_tokens: int) -> list[ScoredGroup]:
    """Groups of random tokens whose rewards differ."""
    random = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        return list(map(int, random.integers(0, VOCABULARY, size)))

    rewards = [float(place % 2) for place in range(group_size)]
    return [
        group(number, "", ids(PROMPT_TOKENS), [completion(ids(num_tokens), 0) for _ in rewards], rewards)
        for number in range(num_groups)
    ]


def measure(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """CPU seconds and bytes by what was done."""
    clock = time.process_time
    start = clock()
    packs = make_packs(make_batch(groups, BatchRules(Overlong(1)), version=0).samples, PACK_TOKENS)
    packed = clock()
    logprobs = [pack.behaviour_logprobs_N + 0.01 for pack in packs]
    begun = clock()
    own = RankLogRatios()
    for pack, logprobs_N in zip(packs, logprobs, strict=True):
        own.add(pack, logprobs_N)
    part = own.part()
    noted = clock()
    with tempfile.TemporaryDirectory() as folder:
        files = StepFiles(Path(folder), keep_bytes=0)
        record = files.write(0, 1, groups)
        written = clock()
        files.write_log_ratios(record, LogRatios((part,)).by_trajectory(groups, version=0, max_lag=None))
        end = clock()
        path = Path(folder) / record.file
        sizes = {"step_file_bytes": path.stat().st_size, "log_ratio_bytes": path.with_suffix(SUFFIX).stat().st_size}
    return {
        "pack_seconds": packed - start,
        "note_seconds": noted - begun,
        "step_file_seconds": written - noted,
        "write_seconds": end - written,
        **sizes,
    }


if __name__ == "__main__":
    main()
