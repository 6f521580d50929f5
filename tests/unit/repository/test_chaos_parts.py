"""The parts of the chaos run: its plan, its pure engine, and its reader, which must find every fault."""

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from benchmarks.chaos.engine import sample, weights_digest
from benchmarks.chaos.reader import RunReader
from benchmarks.chaos.schedule import Plan, deck, pause_seconds

PLAN = Plan({"queue": 3, "trainer": 2}, {"reward": 1}, 2, 1, 2.0, 30.0)
POLICIES = [{"number": 0, "digest": "aa"}, {"number": 1, "digest": "bb"}]


def test_a_seed_is_a_plan() -> None:
    first, again, other = (deck(PLAN, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, other))
    assert sum(card.is_kill for card in first) == PLAN.num_kills == 6
    assert 0 <= pause_seconds(PLAN, random.Random(1)) <= 4.0


def test_a_token_depends_on_prompt_seed_position_and_weights_only(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    two = weights_digest(tmp_path)
    base = sample(one, b"prompt", 5, 0, 1000)
    assert sample(one, b"prompt", 5, 0, 1000) == base
    others = [
        sample(two, b"prompt", 5, 0, 1000),
        sample(one, b"Prompt", 5, 0, 1000),
        sample(one, b"prompt", 6, 0, 1000),
        sample(one, b"prompt", 5, 1, 1000),
    ]
    assert base not in others
    assert all(0 <= token < 1000 and logprob < 0 for token, logprob in others)


class Store:
    """The Redis commands that the reader uses, over a dictionary."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.letters: list[dict[bytes, bytes]] = []
        self.parts: dict[bytes, int] = {}

    def xrange(self, key: str) -> list[Any]:
        if key.endswith(":dead"):
            return [(b"0-1", letter) for letter in self.letters]
        return [(b"0-1", {b"r": msgspec.json.encode(record)}) for record in self.records]

    def scan_iter(self, *, match: str, count: int) -> list[bytes]:
        assert match.endswith(":part:*")
        return list(self.parts)

    def pttl(self, key: bytes) -> int:
        return self.parts[key]

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        return self.hashes.get(key.rpartition(":")[2], {})


class WrittenRun:
    """A run of two steps with one ticket each, without a fault; each test adds one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store()
        self.store.hashes["counters"] = {b"next": b"2", b"issued": b"2", b"trained": b"2"}
        (folder / "steps").mkdir()
        (folder / "final").mkdir()
        (folder / "final" / "model.safetensors").write_bytes(b"weights")
        self.lines: list[dict[str, Any]] = []
        self.weights(0, 0)
        for step in (0, 1):
            self.step(step, [step], 0)
            self.weights(step + 1, 1)

    def weights(self, steps: int, number: int) -> None:
        self.store.records.append({"record": "weights", "policy": POLICIES[number], "steps": steps})

    def step(self, step: int, tickets: list[int], version: int) -> None:
        span = {"policy": POLICIES[version], "start": 0, "end": 2}
        completion = {"token_ids": b"x" * 8, "spans": [span]}
        groups = [{"group": {"ticket": {"number": each}, "completions": [completion]}} for each in tickets]
        data = msgspec.msgpack.encode({"groups": groups})
        (self.folder / "steps" / f"{step}.pack").write_bytes(data)
        record = {"record": "step", "step": step, "tickets": tickets, "file": f"{step}.pack"}
        self.store.records.append({**record, "digest": xxhash.xxh3_64_hexdigest(data)})
        self.lines.append({"step": step, "tickets": tickets})

    def problems(self, max_staleness: int = 1) -> str:
        lines = "".join(msgspec.json.encode(line).decode() + "\n" for line in self.lines)
        (self.folder / "steps.jsonl").write_text(lines)
        store: Any = self.store
        reader = RunReader(store, "run", self.folder)
        return "\n".join(reader.read(num_tickets=2, batch_size=1, max_staleness=max_staleness).problems)


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    return WrittenRun(tmp_path)


def test_the_reader_accepts_a_run_without_a_fault(run: WrittenRun) -> None:
    assert run.problems() == ""


def test_the_reader_finds_a_stale_token(run: WrittenRun) -> None:
    assert "a token of staleness 1" in run.problems(max_staleness=0)


def test_the_reader_finds_a_lost_ticket(run: WrittenRun) -> None:
    run.store.records = [each for each in run.store.records if each.get("step") != 1]
    assert "tickets [1] were issued and never ended" in run.problems()


def test_the_reader_finds_a_ticket_that_ended_twice(run: WrittenRun) -> None:
    run.store.records.append({"record": "drop", "ticket": 1, "reason": "poison"})
    assert "tickets [1] ended more than once" in run.problems()


def test_the_reader_finds_another_step_file(run: WrittenRun) -> None:
    (run.folder / "steps" / "1.pack").write_bytes(msgspec.msgpack.encode({"groups": []}))
    assert "has another digest" in run.problems()


def test_the_reader_finds_weights_that_nobody_recorded(run: WrittenRun) -> None:
    run.store.records[0]["policy"] = {"number": 0, "digest": "cc"}
    assert "recorded is cc" in run.problems()


def test_the_reader_finds_a_step_that_steps_jsonl_lacks(run: WrittenRun) -> None:
    run.lines.pop()
    assert "steps.jsonl lacks steps [1]" in run.problems()


def test_the_reader_finds_parts_that_no_dead_letter_and_no_time_will_end(run: WrittenRun) -> None:
    run.store.letters = [{b"n": b"aa"}]
    run.store.parts = {b"p:part:aa:texts": -1, b"p:part:bb:texts": 900}
    assert run.problems() == ""
    run.store.parts[b"p:part:cc:completions"] = -1
    assert "1 parts of groups are left" in run.problems()


def test_the_reader_finds_what_is_outstanding_at_the_end(run: WrittenRun) -> None:
    run.store.hashes["live"] = {b"7": b"scored|1-1|0"}
    assert "outstanding at the end" in run.problems()
