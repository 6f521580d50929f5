"""The parts of the chaos run: its plan, its pure engine, and its reader, which must find every fault."""

import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from benchmarks.chaos.chaos_environment import FAULTS, EarlyLetters
from benchmarks.chaos.engine import sample, weights_digest
from benchmarks.chaos.reader import Findings, RunReader
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
        kind = match.split(":")[2].encode()
        return [key for key in self.parts if key.split(b":")[1] == kind]

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
        completion = {"token_ids": b"x" * 8, "logprobs": b"y" * 8, "spans": [span]}
        groups = [
            {
                "group": {"ticket": {"number": each}, "completions": [completion]},
                "scores": [{"value": 1.0}],
            }
            for each in tickets
        ]
        self.write_step(step, tickets, groups)

    def episode_step(self, step: int, episode: dict[str, Any], value: float | None = 1.0, **metadata: str) -> None:
        """Instead of a completion, the step has this episode."""
        later = [each for each in self.store.records if each.get("step", -1) > step]
        self.store.records = [each for each in self.store.records if each.get("step", -1) < step]
        self.lines = [each for each in self.lines if each["step"] != step]
        ticket = {"number": step, "metadata": metadata}
        group = {"group": {"ticket": ticket, "completions": [], "episodes": [episode]}, "scores": [{"value": value}]}
        self.write_step(step, [step], [group])
        self.store.records += later
        self.lines.sort(key=lambda each: each["step"])

    def write_step(self, step: int, tickets: list[int], groups: list[dict[str, Any]]) -> None:
        data = msgspec.msgpack.encode({"groups": groups})
        (self.folder / "steps" / f"{step}.pack").write_bytes(data)
        record = {"record": "step", "step": step, "tickets": tickets, "file": f"{step}.pack"}
        self.store.records.append({**record, "digest": xxhash.xxh3_64_hexdigest(data)})
        self.lines.append({"step": step, "tickets": tickets})

    def problems(self, max_staleness: int = 1, num_failing: int = 0) -> str:
        return "\n".join(self.findings(max_staleness, num_failing).problems)

    def findings(self, max_staleness: int = 1, num_failing: int = 0) -> Findings:
        lines = "".join(msgspec.json.encode(line).decode() + "\n" for line in self.lines)
        (self.folder / "steps.jsonl").write_text(lines)
        store: Any = self.store
        reader = RunReader(store, "run", self.folder)
        return reader.read(
            num_tickets=2, batch_size=1, max_staleness=max_staleness, num_failing=num_failing, failing=FAULTS
        )


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


def episode(*parents: int, value: float | None = 1.0, num_turns: int = 2) -> dict[str, Any]:
    """Context and answers in turns, with these parents."""
    span = {"policy": POLICIES[0], "start": 0, "end": 2}
    context: dict[str, Any] = {"logprobs": None, "spans": []}
    answer: dict[str, Any] = {"logprobs": b"y" * 8, "spans": [span]}
    nodes = [
        {"parent": parent, "token_ids": bytes([index]) * 8, **(answer if index % 2 else context)}
        for index, parent in enumerate(parents)
    ]
    return {"nodes": nodes, "score": {"value": value}, "counts": {"num_turns": num_turns, "num_attempts": 2}}


def test_the_reader_counts_episodes_turns_and_attempts(run: WrittenRun) -> None:
    run.episode_step(0, episode(-1, 0, 1, 2))
    run.episode_step(1, episode(value=None), value=None)
    found = run.findings()
    assert found.problems == []
    assert (found.episodes, found.failed_episodes, found.turns, found.repeated_attempts) == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("parents", "value", "score", "problem"),
    [
        ((-1, 0, 0, 2), 1.0, 1.0, "nodes of an episode are no path of turns"),
        ((-1, 0, 1), 1.0, 1.0, "nodes of an episode are no path of turns"),
        ((-1, 0), 1.0, 1.0, "2 nodes of 2 turns"),
        ((-1, 0, 1, 2), None, 0.0, "a failed episode has the score 0.0"),
        ((), None, 0.0, "a failed episode has the score 0.0"),
        ((-1, 0, 1, 2), 1.0, None, "an episode lost the score of its environment"),
    ],
)
def test_the_reader_finds_a_fault_of_an_episode(
    run: WrittenRun, parents: tuple[int, ...], value: float | None, score: float | None, problem: str
) -> None:
    run.episode_step(0, episode(*parents, value=value), score)
    assert problem in run.problems()


def test_the_reader_finds_what_was_trained_though_its_row_fails(run: WrittenRun) -> None:
    run.episode_step(0, episode(-1, 0, 1, 2), fault="nan")
    assert "trained, though its row has the fault nan" in run.problems()
    assert "0 tickets were dropped as reward_failed; expected at least 1" in run.problems(num_failing=1)


def test_the_reader_finds_finished_episodes_that_outlive_their_ticket(run: WrittenRun) -> None:
    run.store.parts = {b"p:episodes:tickets:1-1": 86_400_000}
    assert "episodes of 1 tickets are left" in run.problems()


def test_the_digest_of_what_was_trained_has_tokens_and_rewards_and_no_attempts(run: WrittenRun) -> None:
    def digest(value: float = 1.0, **changes: Any) -> str:
        run.episode_step(0, episode(-1, 0, 1, 2) | changes, value)
        return run.findings().sampled_digest

    other_nodes = episode(-1, 0, 1, 2)["nodes"]
    other_nodes[1]["token_ids"] = b"z" * 8
    once = {"num_turns": 2, "num_attempts": 1}
    assert digest() == digest(counts=once)
    assert len({digest(), digest(0.5), digest(nodes=other_nodes)}) == 3


def play(folder: Path, fault: str, *texts: str) -> Any:
    """What the environment answers to the last of the texts."""
    environment = EarlyLetters()
    environment.reset("1+2=", fault, str(folder), answer="")
    return [environment.step(text) for text in texts][-1]


def test_the_environment_depends_on_what_is_said_only(tmp_path: Path) -> None:
    assert play(tmp_path, "", "abq", "qq") == "2="
    assert play(tmp_path, "", "abq", "x") == 0.5
    assert play(tmp_path, "text", "abx") == "2="
    assert play(tmp_path, "none", "abx") is None
    assert math.isnan(play(tmp_path, "nan", "abx"))
    with pytest.raises(ConnectionError):
        play(tmp_path, "fails", "")
    lies = [math.isnan(play(tmp_path, "sometimes", f"{number}x")) for number in range(40)]
    assert lies == [math.isnan(play(tmp_path, "sometimes", f"{number}x")) for number in range(40)]
    assert set(lies) == {True, False}


def test_the_environment_hangs_once_after_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hung: list[float] = []
    monkeypatch.setattr("benchmarks.chaos.chaos_environment.time.sleep", hung.append)
    for _ in range(2):
        for number in range(30):
            play(tmp_path, "hangs", f"{number}")
    assert 0 < len(hung) < 30
    assert len(hung) == len(list(tmp_path.iterdir()))
