"""Folders of runs as a trainer writes them, made without one: for the page's tests and for its benchmark.

Owns the form of what it writes, by the program's own messages. Invariant: the same arguments give the same run.
"""

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash
import yaml

from penstock.contracts import (
    Completion,
    Episode,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
)
from penstock.contracts.ledger import DropRecord, Record, RunRecord, StepRecord, WeightsRecord, encode_record
from penstock.contracts.log_ratios import SUFFIX, LogRatiosFile
from penstock.contracts.step_file import StepFile
from penstock.contracts.vocabulary import MAIN_SET, DropReason
from penstock.records.dead_letters import DeadLetterLine
from penstock.records.samples import DroppedLine, SampleLine

END = 256
"""The special token of the tokenizer below; the others are the 256 bytes."""
STARTED_AT = 1_790_000_000.0
STEP_SECONDS = 4.0


def write_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    """A model's folder with a tokenizer of one token for each byte, and one special token; how it encodes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text).ids)


def identity(version: int) -> PolicyIdentity:
    """The weights of a version."""
    return PolicyIdentity(version, xxhash.xxh3_64_hexdigest(f"version {version}".encode()))


def completion(ids: Sequence[int], version: int, *, changes_at: int | None = None, end: str = "stop") -> Completion:
    """A completion sampled by `version`; from token `changes_at` on by the next one."""
    spans = [VersionSpan(identity(version), 0, len(ids))] if ids else []
    if changes_at is not None:
        spans = [
            VersionSpan(identity(version), 0, changes_at),
            VersionSpan(identity(version + 1), changes_at, len(ids)),
        ]
    logprobs = pack_float32(-((each % 7) / 4) for each in ids)
    return msgspec.convert(
        {
            "token_ids": pack_int32(ids),
            "loss_mask": None,
            "logprobs": logprobs,
            "spans": tuple(spans),
            "text": "",
            "finish_reason": end,
        },
        Completion,
    )


def group(
    ticket: int,
    prompt: str,
    prompt_ids: Sequence[int],
    made: Sequence[Completion] | Sequence[Episode],
    rewards: Sequence[float | None],
    *,
    server: str = "rollout-0",
    started_at: float = STARTED_AT,
    version: int = 0,
    answer: str = "4",
) -> ScoredGroup:
    """A scored group; a reward of None failed."""
    episodes = tuple(each for each in made if isinstance(each, Episode))
    completions = tuple(each for each in made if isinstance(each, Completion))
    return ScoredGroup(
        RolloutGroup(
            Ticket(
                purpose="train",
                number=ticket,
                attempt=0,
                policy_version=version,
                prompt=prompt,
                prompt_ids=b"" if episodes else pack_int32(prompt_ids),
                seeds=tuple(range(len(made))),
                sampling=Sampling(1.0, 64, (END,)),
                answer=answer,
                reward="",
                metadata={},
                environment="calculator:Calculator" if episodes else "",
            ),
            completions,
            server,
            started_at,
            started_at + STEP_SECONDS,
            episodes,
        ),
        tuple(Score(None, "judge: TimeoutError") if reward is None else Score(reward) for reward in rewards),
        ("exact_match",),
    )


@dataclass
class SyntheticRun:
    """A run's folder that grows step by step. dataset_length: prompts of an epoch."""

    folder: Path
    model: str
    dataset_length: int = 64
    num_steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def begin(self, *, group_size: int, batch_size: int) -> None:
        """Write the configuration and the first records."""
        (self.folder / "steps").mkdir(parents=True, exist_ok=True)
        config = {"actor": {"path": self.model, "group_size": group_size}, "data": {"batch_size": batch_size}}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.settings = {
            "loss.advantage.baseline": "group",
            "loss.advantage.scale": "group",
            "loss.advantage.eps": 1e-6,
            "kl_ctl": 0.0,
            "loss.kl.place": "loss",
        }
        data = msgspec.json.encode(self.settings)
        self._settings_digest = xxhash.xxh3_64_hexdigest(data)
        (self.folder / "steps" / f"settings-{self._settings_digest}.json").write_bytes(data)
        run = RunRecord("0" * 16, self.dataset_length, batch_size, group_size, seed=3)
        self.record(run, WeightsRecord(identity(0), 0))

    def record(self, *records: Record) -> None:
        """Append to the ledger."""
        self._append("steps/ledger.jsonl", (encode_record(each) for each in records))

    def drop(self, ticket: int, reason: Any, why: str = "") -> None:
        """End a ticket without a step."""
        self.record(DropRecord(ticket, reason, why=why))

    def bury(self, ticket: str, why: str, text: str) -> None:
        """Note a dead letter."""
        line = DeadLetterLine(
            f"{STARTED_AT * 1000:.0f}-0", ticket, "0", "tickets", STARTED_AT, why, len(text), "it does not decode", text
        )
        self._append("dead.jsonl", [msgspec.json.encode(line)])

    def drop_without_rewards(self, each: ScoredGroup, why: str) -> None:
        """Drop a group before the present step, because its rewards failed, and keep a completion of it for people."""
        self.drop(each.group.ticket.number, DropReason.REWARD_FAILED)
        [sample] = samples(self.num_steps, [each])
        values = {**msgspec.structs.asdict(sample), "reward": None, "failure": why}
        line = DroppedLine(**values, dropped=str(DropReason.REWARD_FAILED))
        self._append("dropped.jsonl", [msgspec.json.encode(line)])

    def add_step(
        self,
        groups: Sequence[ScoredGroup],
        *,
        keep_file: bool = True,
        log_ratios: Sequence[Sequence[Sequence[float]]] | None = None,
        **figures: float,
    ) -> StepRecord:
        """Train a step: its file (pruned unless `keep_file`), records, line, and a sample of each group.

        log_ratios: of each sampled token of each trajectory of each group; None: not recorded.
        """
        step = self.num_steps
        data = msgspec.msgpack.encode(StepFile(step, 1, tuple(groups)))
        name = f"{step:08d}.1.pack"
        if keep_file:
            (self.folder / "steps" / name).write_bytes(data)
        tickets = tuple(each.group.ticket.number for each in groups)
        record = StepRecord(
            step, tickets, name, xxhash.xxh3_64_hexdigest(data), version=step, settings=self._settings_digest
        )
        if log_ratios is not None:
            rows = tuple(tuple(struct.pack(f"<{len(each)}e", *each) for each in row) for row in log_ratios)
            content = msgspec.msgpack.encode(LogRatiosFile(step, record.digest, rows))
            (self.folder / "steps" / name).with_suffix(SUFFIX).write_bytes(content)
        self.record(record, WeightsRecord(identity(step + 1), step + 1))
        self._append("samples.jsonl", map(msgspec.json.encode, samples(step, groups)))
        self._append("steps.jsonl", [msgspec.json.encode(step_line(step, groups, figures))])
        self.num_steps += 1
        return record

    def evaluate(
        self,
        accuracy: float | None,
        shown: Sequence[tuple[str, str, str, float]],
        failed: Sequence[str] = (),
        *,
        name: str = MAIN_SET,
    ) -> None:
        """Add an evaluation of 20 prompts after the present steps.

        accuracy: of those with a reward. shown: prompt, completion, answer and reward of some prompts. failed: why, of
        each prompt without a reward. name: of the set.
        """
        names = ("prompt", "completion", "answer", "reward")
        line = {
            "set": name,
            "steps": self.num_steps,
            "accuracy": accuracy,
            "reward_mean": accuracy,
            "num_prompts": 20,
            "num_scored": 20 - len(failed),
            "num_failed": len(failed),
            "oldest_version": self.num_steps,
            "newest_version": self.num_steps,
            "failures": dict(Counter(failed).most_common(3)),
            "success": 1.0,
            "prompts": "0" * 16,
            "samples": [{**dict(zip(names, each, strict=True)), "failure": ""} for each in shown],
            "failed": [
                {"prompt": f"failed {place}", "completion": "?", "answer": "4", "reward": None, "failure": why}
                for place, why in enumerate(failed)
            ],
        }
        self._append("evals.jsonl", [msgspec.json.encode(line)])

    def _append(self, name: str, lines: Iterable[bytes]) -> None:
        with (self.folder / name).open("ab") as file:
            file.writelines(line + b"\n" for line in lines)


def samples(step: int, groups: Sequence[ScoredGroup]) -> Iterable[SampleLine]:
    """The first completion of each group, as lines for people."""
    for each in groups:
        score = each.scores[0]
        trajectory = each.group.trajectories[0]
        yield SampleLine(
            step=step,
            version=trajectory.oldest_version,
            ticket=each.group.ticket.number,
            index=0,
            prompt=each.group.ticket.prompt,
            completion=trajectory.text or f"completion of ticket {each.group.ticket.number}",
            answer=each.group.ticket.answer,
            reward=score.value,
            failure=score.failure,
            num_tokens=trajectory.num_tokens,
        )


def step_line(step: int, groups: Sequence[ScoredGroup], figures: dict[str, float]) -> dict[str, Any]:
    """The line of a step, with the figures of its rewards. figures: of the update."""
    rewards = [score.value for each in groups for score in each.scores if score.value is not None]
    mean = sum(rewards) / len(rewards)
    return {
        "step": step,
        "version": step + 1,
        "epoch": step / 8,
        "tickets": [each.group.ticket.number for each in groups],
        "started_at": STARTED_AT + STEP_SECONDS * step,
        "ended_at": STARTED_AT + STEP_SECONDS * (step + 1),
        "seconds": {
            **{"wait": 1.0, "commit": 0.1, "update": 2.5, "push_wait": 0.4, "stage": 0.2, "push": 0.5},
            **{"push_paused": 0.1, "push_exposed": 0.5, "pack": 0.1, "forward_backward": 2.0, "optimizer": 0.4},
            "step": STEP_SECONDS,
        },
        "pushes": [
            {
                "version": step,
                "started_at": STARTED_AT + STEP_SECONDS * step + 0.2,
                "ended_at": STARTED_AT + STEP_SECONDS * step + 0.7,
                "paused_seconds": 0.1,
            }
        ],
        "generation_seconds": 3.0,
        "generated_tokens": sum(each.num_tokens for one in groups for each in one.group.trajectories),
        "reward_mean": mean,
        "staleness_max": 1,
        "staleness_mean": 0.5,
        "statistics": {
            "reward_std": math.sqrt(sum((each - mean) ** 2 for each in rewards) / len(rewards)),
            **{"loss": 0.1, "grad_norm": 1.0, "entropy": 1.0, "behaviour_kl": 0.01, "reference_kl": 0.0},
            **{"effective_sample_size_ratio": 0.9, "length_generated": 3.0, "clipped_ratio": 0.0},
            **{"no_signal_ratio": 0.25, "failed_reward_ratio": 0.0, "truncated_ratio": 0.0, "learning_rate": 1e-5},
            **figures,
        },
        "rewards": {"exact_match": {"mean": mean, "std": 0.0, "num_failed": 0}},
        "failures": {},
        "histograms": {"reward": {"lowest": 0.0, "highest": 1.0, "counts": [5, 3]}},
    }


def write_long_run(
    folder: Path,
    model: Path,
    *,
    num_steps: int,
    num_groups: int = 8,
    group_size: int = 4,
    num_tokens: int = 4,
    files_every: int = 1,
) -> SyntheticRun:
    """A run of many steps, whose reward rises from 0 to 1; every `files_every`-th step file was not pruned."""
    run = SyntheticRun(folder, str(model))
    run.begin(group_size=group_size, batch_size=num_groups)
    prompt_ids = [50, 51, 52]
    for step in range(num_steps):
        right = round(group_size * num_groups * (step + 1) / num_steps)
        flags = [1.0 if place < right else 0.0 for place in range(group_size * num_groups)]
        groups = [
            group(
                step * num_groups + number,
                f"prompt {(step * num_groups + number) % run.dataset_length}",
                prompt_ids,
                [completion([(step + place) % 250] * num_tokens, step) for place in range(group_size)],
                flags[number * group_size : (number + 1) * group_size],
                started_at=STARTED_AT + STEP_SECONDS * (step - 1),
                version=step,
            )
            for number in range(num_groups)
        ]
        run.add_step(groups, keep_file=step % files_every == 0)
        if step % max(1, num_steps // 10) == 0:
            run.evaluate(step / num_steps, [("2+2=", str(step), "4", 0.0)])
    return run
